"""One of the processes that `accelerate launch` has started: its share of the weights, and the report of all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.optim import SGD

from ..bad_input import BadInput
from ..models import LoadedModel, load_model
from .table import Report


@dataclass(frozen=True)
class Launch:
    """
    What this process is a part of.

    Args:
        accelerator ([`~accelerate.Accelerator`], *optional*):
            That of a launch of several processes, made before the model is loaded: what it says of shards guides the
            loading.
    """

    accelerator: Accelerator | None

    @classmethod
    def of_this_process(cls) -> Launch:
        """Whatever started it."""
        accelerator = Accelerator()
        return cls(accelerator if accelerator.num_processes > 1 else None)

    @property
    def process(self) -> int:
        """Rank of this process."""
        return 0 if self.accelerator is None else self.accelerator.process_index

    @property
    def sharding(self) -> str | None:
        """What shards the weights in training, if anything: stages 1 and 2 of ZeRO do not."""
        if self.accelerator is None:
            return None
        state = self.accelerator.state
        if state.distributed_type is DistributedType.DEEPSPEED:
            return "ZeRO-3" if state.deepspeed_plugin.zero_stage == 3 else None
        return f"FSDP{state.fsdp_plugin.fsdp_version}" if state.distributed_type is DistributedType.FSDP else None

    def load(self, name: str, dtype: str, device: str | None, trust_remote_code: bool = False) -> LoadedModel:
        """
        Load a model as training has it.

        Args:
            name (`str`):
                Id on the Hugging Face Hub, a local folder, or that of a LoRA adapter.
            dtype (`str`):
                `"auto"`, or the name of a torch dtype.
            device (`str`, *optional*):
                Device, the CPU by default; a launch has its own.
            trust_remote_code (`bool`, *optional*, defaults to `False`):
                Whether code that comes with the checkpoint is run.

        Returns:
            [`~trl_r3.cli.models.LoadedModel`]: With `forward`, where Accelerate has wrapped or sharded it.

        Raises:
            [`BadInput`]: As [`~trl_r3.cli.models.load_model`], or if a launch is given a device, or the first FSDP.
        """
        if self.accelerator is None:
            return load_model(name, dtype, device or "cpu", trust_remote_code=trust_remote_code)
        if device is not None:
            raise BadInput(f"`--device` is {device!r}, but a launch gives each process its own. Leave it out.")
        if self.sharding == "FSDP1":
            raise BadInput(
                "`fsdp_version` is 1, routing replay needs 2. Set `fsdp_version: 2` in the launch's config."
            )
        if self.sharding is None:
            loaded = load_model(name, dtype, str(self.accelerator.device), trust_remote_code=trust_remote_code)
            forward = self.accelerator.prepare_model(loaded.model, evaluation_mode=True)
            return replace(loaded, forward=forward)
        loaded = load_model(name, dtype, None, trust_remote_code=trust_remote_code)
        forward = _sharded(self.accelerator, loaded.model)
        model = self.accelerator.unwrap_model(forward).requires_grad_(False)
        register_fsdp_forward_method(model, "generate")  # as Trainer does: that of an adapter runs the model inside it
        if self.sharding == "ZeRO-3":
            forward = model  # hooks fetch the weights; an engine without an optimizer refuses to go backward
        return replace(loaded, model=model.eval(), forward=forward, sharding=self.sharding)

    def report_of_all(self, report: Report) -> Report:
        """
        The report of the first process in which something is wrong, or of the first one.

        Every process has to come here.
        """
        if self.accelerator is None:
            return report
        reports = gather_object([report])
        failed = [rank for rank, each in enumerate(reports) if not each.passed]
        shown = failed[0] if failed else 0
        return replace(
            reports[shown], process=shown, num_processes=len(reports), failed=failed, sharding=self.sharding
        )

    def end(self) -> None:
        """Leave the launch, together."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()


def _sharded(accelerator: Accelerator, model: Any) -> Any:
    """What training calls; nothing is optimized."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return accelerator.prepare(model, SGD(model.parameters(), lr=0.0))[0]  # FSDP2 wants both
    config = plugin.deepspeed_config
    for part in ("optimizer", "scheduler"):
        config.pop(part, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    config["train_micro_batch_size_per_gpu"] = 1  # no data loader says it
    return accelerator.prepare(model)
