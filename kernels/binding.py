"""Makes the formulas callable from Numba kernels, on the CPU and on the GPU alike."""

import inspect
import itertools
from collections.abc import Callable


def bind(intrinsic: Callable, types, arithmetic: type, emit: Callable, n_results: int = 1) -> Callable:
    """A Numba intrinsic that emits `emit(arithmetic, *arguments)`.

    The arguments are numbers of the computation format, tuples of them (a row state for instance, which reaches `emit`
    as a tuple) or None, of which nothing but None is made. On the CPU any of them may be a vector: numbers beside it
    are then the same in every lane.
    Returns one value or a tuple of `n_results`. `intrinsic` and `types` are the target's: numba.extending's or
    numba.cuda's.
    """

    def function(typingctx, *arguments):
        parts = [argument.types if isinstance(argument, types.BaseTuple) else (argument,) for argument in arguments]
        operands = [part for part in itertools.chain(*parts) if not isinstance(part, types.NoneType)]
        if not operands:
            return types.none(*arguments), lambda context, builder, signature, values: context.get_dummy_value()
        operand = next((part for part in operands if not isinstance(part, types.Float)), operands[0])
        result = operand if n_results == 1 else types.UniTuple(operand, n_results)

        def codegen(context, builder, signature, values):
            of = arithmetic(builder, context.get_value_type(operand))

            def unpacked(value, type):
                if isinstance(type, types.NoneType):
                    return None
                if isinstance(type, types.BaseTuple):
                    return tuple(unpacked(builder.extract_value(value, i), part) for i, part in enumerate(type.types))
                return of.splat(value) if type is not operand else value

            results = emit(of, *map(unpacked, values, signature.args))
            return results if n_results == 1 else context.make_tuple(builder, result, list(results))

        return result(*arguments), codegen

    # Numba reads the number of arguments from the signature and would pack *arguments into a tuple.
    parameters = list(inspect.signature(emit).parameters.values())
    function.__signature__ = inspect.Signature([parameters[0].replace(name="typingctx"), *parameters[1:]])
    function.__name__ = emit.__name__
    return intrinsic(function)
