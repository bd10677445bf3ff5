"""How helpers are compiled: to LLVM code that becomes a part of the kernels, never to machine code of their own.

Numba optimises every function it compiles and translates it to machine code, with all that it calls, although a helper
is only ever inlined: nested five deep, a kernel would be translated five times over.
"""

from numba import version_info
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import AnalysisPass, PassManager, register_pass
from numba.core.typed_passes import NativeLowering, NopythonTypeInference

from gpusoftmax.kernels.numba_passes import without_unused


class _HelperLibrary(JITCodeLibrary):
    """LLVM code to be linked into that of callers."""

    def _optimize_functions(self, ll_module):
        """As Numba does, but not for the functions that are only declared: most of them are."""
        if version_info.short < (0, 62):  # which has LLVM's older passes, even where llvmlite has the newer
            super()._optimize_functions(ll_module)
            return
        ll_module.data_layout = self._codegen._data_layout
        for function in ll_module.functions:
            if not function.is_declaration:
                passes, builder = self._codegen._function_pass_manager()
                passes.run(function, builder)

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=False, analysis_only=True)
class _UseHelperLibrary(AnalysisPass):
    _name = "use_helper_library"

    def __init__(self):
        AnalysisPass.__init__(self)

    def run_pass(self, state):
        state.library = _HelperLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        state.flags.no_compile = True
        return False


@register_pass(mutates_CFG=False, analysis_only=True)
class _RegisterHelper(AnalysisPass):
    """What Numba does for functions that it translates: makes the code known to callers."""

    _name = "register_helper"

    def __init__(self):
        AnalysisPass.__init__(self)

    def run_pass(self, state):
        # Numba knows compiled functions by an entry written in C. This one is unlike any other and takes no arguments:
        # calling a helper from Python is a TypeError.
        entry = object().__sizeof__
        state.targetctx.insert_user_function(entry, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=entry)
        return False


class KernelCompiler(CompilerBase):
    def define_pipelines(self):
        pipeline = _pipeline(self.state)
        pipeline.finalize()
        return [pipeline]


class HelperCompiler(CompilerBase):
    def define_pipelines(self):
        pipeline = _pipeline(self.state)
        pipeline.add_pass_after(_UseHelperLibrary, NopythonTypeInference)
        pipeline.add_pass_after(_RegisterHelper, NativeLowering)
        pipeline.finalize()
        return [pipeline]


def _pipeline(state):
    pipeline = PassManager("kernel")
    pipeline.passes.extend(without_unused(DefaultPassBuilder.define_nopython_pipeline(state).passes))
    return pipeline
