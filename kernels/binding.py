"""Makes the formulas callable from Numba kernels, on the CPU and on the GPU alike."""

import inspect
from collections.abc import Callable


def bind(intrinsic: Callable, types, arithmetic: type, emit: Callable, n_results: int = 1) -> Callable:
    """A Numba intrinsic that emits `emit(arithmetic, *arguments)`.

    All arguments have one type, the computation format (a number or a vector of them); a tuple of such numbers, a row
    state for instance, reaches `emit` as a tuple. Returns one value or a tuple of `n_results`.
    `intrinsic` and `types` are the target's: numba.extending's or numba.cuda's.
    """

    def function(typingctx, *arguments):
        first = arguments[0].dtype if isinstance(arguments[0], types.BaseTuple) else arguments[0]
        result = first if n_results == 1 else types.UniTuple(first, n_results)

        def codegen(context, builder, signature, values):
            unpacked = [
                tuple(builder.extract_value(value, i) for i in range(len(type)))
                if isinstance(type, types.BaseTuple)
                else value
                for type, value in zip(signature.args, values, strict=True)
            ]
            results = emit(arithmetic(builder, context.get_value_type(first)), *unpacked)
            return results if n_results == 1 else context.make_tuple(builder, result, list(results))

        return result(*arguments), codegen

    # Numba reads the number of arguments from the signature and would pack *arguments into a tuple.
    parameters = list(inspect.signature(emit).parameters.values())
    function.__signature__ = inspect.Signature([parameters[0].replace(name="typingctx"), *parameters[1:]])
    function.__name__ = emit.__name__
    return intrinsic(function)
