"""FSDP2 on two CPU processes (gloo): trains as one process does, with every loss, saves light, resumes, reloads.

Accelerate (1.15) takes FSDP for processes on an accelerator only, whatever its configuration says: of CPUs it makes a
DDP run. So the processes here tell it that they are on one; what shards, gathers and saves is as on GPUs.
"""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from light_checkpoints import assert_same_weights, save_towers, trained_names
from light_runs import make_trainer, new_model
from processes import ForkServer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel

SETTINGS = {
    "max_steps": 4,
    "save_steps": 2,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch",
    "adam_epsilon": 1e-2,  # smooth: else rounding decides the sign of an update where a gradient is almost zero
    "learning_rate": 1e-2,
    "projector_learning_rate": 2e-2,
    "response_kl_weight": 0.5,  # the teacher reads by the same sharded weights
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": True,
    **{"eval_strategy": "steps", "eval_steps": 4, "log_completions": 1},
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def train_sharded(towers: Path, folder: Path) -> None:
    """Two runs of one rank: whole, and resumed from its middle."""
    start = AcceleratorState.__init__

    def start_as_on_gpus(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        if PartialState._shared_state and not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = start_as_on_gpus
    for resume in (None, str(folder / "run" / "checkpoint-2")):
        trainer = make_trainer(folder, model_without_dropout(towers), per_device_train_batch_size=2, **SETTINGS)
        expected = trained_names(trainer.model)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.accelerator.is_fsdp2 and all(isinstance(p, DTensor) for p in trainer.model.parameters())
        assert trained_names(trainer.model) == expected
        trainer.save_model(str(folder / ("resumed" if resume else "end")))


def model_without_dropout(towers: Path) -> nn.Module:
    model = new_model(towers)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.slow
def test_two_processes_of_fsdp2_end_where_one_process_does(fork_server: ForkServer, tmp_path: Path) -> None:
    towers = save_towers(tmp_path)
    alone = make_trainer(
        tmp_path,
        model_without_dropout(towers),
        output_dir=str(tmp_path / "alone"),
        per_device_train_batch_size=4,
        **SETTINGS,
    )
    alone.train()
    ranks = fork_server.run_ranks(train_sharded, towers, tmp_path, **FSDP)
    assert [rank.exitcode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:] + ranks[1].stderr[-3000:]
    end, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("end", "resumed"))
    assert end.keys() == resumed.keys() == trained_names(alone.model)
    assert all(torch.equal(resumed[name], weight) for name, weight in end.items())
    moved = model_without_dropout(towers)
    for name, weight in end.items():
        torch.testing.assert_close(weight, alone.model.get_parameter(name).detach(), rtol=1e-3, atol=2e-5, msg=name)
        assert not torch.equal(weight, moved.get_parameter(name)), name
    loaded = AutoModel.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert_same_weights(loaded, AutoModel.from_pretrained(tmp_path / "end"))
    assert trained_names(loaded) == trained_names(alone.model)
    frozen = {name for name, _ in alone.model.named_parameters()} - end.keys()
    assert all(torch.equal(loaded.get_parameter(name), alone.model.get_parameter(name)) for name in frozen)
