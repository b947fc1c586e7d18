"""Checkpoints that appear whole or not at all, for any ``transformers.Trainer``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ptft_hf import checkpoints


class AtomicCheckpoints:
    """To be inherited before a ``transformers.Trainer``: its checkpoint is written beside its place, given a
    manifest, and renamed into it."""

    args: Any
    state: Any
    accelerator: Any
    _staging: Path | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staging = root / f"{checkpoints.STAGING}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        # A best checkpoint that is this one is known by its final place.
        best = self.state.best_global_step
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            path = root / f"checkpoint-{best}" if best else None
            self.state.best_model_checkpoint = str(path) if path else None
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
            checkpoints.publish(staging / name, root / name)
            staging.rmdir()
            checkpoints.rotate(root, self.args.save_total_limit, best)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))  # type: ignore[misc]
