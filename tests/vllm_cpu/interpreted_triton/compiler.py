"""A Triton backend that compiles nothing: with TRITON_INTERPRET=1 kernels run as Python."""

from triton.backends.compiler import BaseBackend, GPUTarget

_REASON = "this backend compiles nothing. Set TRITON_INTERPRET=1, under which Triton interprets its kernels."


class NothingCompiled(BaseBackend):
    """What Triton asks of a compiler, refused."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError(_REASON)

    def add_stages(self, stages: dict, options: object, language: object) -> None:
        raise NotImplementedError(_REASON)

    def load_dialects(self, context: object) -> None:
        raise NotImplementedError(_REASON)

    def get_module_map(self) -> dict:
        return {}
