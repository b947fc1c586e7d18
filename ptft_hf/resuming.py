"""What upstream's checkpoints leave out, without which a resumed run is not the one that was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.trainer_callback import ExportableState

from ptft_hf import checkpoints
from ptft_hf.errors import CheckpointError


class RunningState(transformers.TrainerCallback, ExportableState):
    """Keeps in each checkpoint, and restores, what upstream starts anew on a resume (transformers 5.23): the
    losses since the last log, the patience that early stopping has left, and that it has stopped the run.

    Upstream can restore callbacks (``restore_callback_states_from_checkpoint``), but builds new ones for it and
    takes back the stop.

    A save at an epoch's last step waits for what is logged and evaluated at its end: a run that goes on from
    there begins with the next epoch.

    Args:
        trainer: The trainer whose callback this is.
    """

    def __init__(self, trainer: transformers.Trainer) -> None:
        self.trainer: Any = trainer
        self.waiting = False
        self.losses: list[float] = []

    def gather(self) -> None:
        """Collect every process's running loss: float32, which JSON keeps to the bit. All processes call it."""
        self.losses = self.trainer.accelerator.gather(self.trainer._tr_loss.reshape(1)).tolist()

    def state(self) -> dict[str, Any]:
        """Upstream asks for it at every save, and once before training."""
        last_log = vars(self.trainer).get("_globalstep_last_logged", 0)
        return {"attributes": {"losses": self.losses, "last_log": last_log}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.global_step:
            return
        saved = {name: value["attributes"] for name, value in state.stateful_callbacks.items()}
        stopped = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
        own = saved[type(self).__name__]
        self.trainer._tr_loss = torch.full_like(self.trainer._tr_loss, own["losses"][args.process_index])
        self.trainer._globalstep_last_logged = own["last_log"]
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState) and callback is not self:
                vars(callback).update(saved.get(type(callback).__name__, {}))
        control.should_training_stop = stopped

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waiting = control.should_save and (
            control.should_training_stop or float(state.epoch).is_integer()
        )
        control.should_save = control.should_save and not self.waiting

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_save or self.waiting
        self.waiting = False


def check_best(folder: Path) -> None:
    """Upstream loads the best checkpoint as it is, however damaged.

    Raises:
        CheckpointError: Its files are not as they were written.
    """
    if problems := checkpoints.damage(folder):
        raise CheckpointError(*problems, "the best checkpoint is lost; --resume goes on from an earlier one")
