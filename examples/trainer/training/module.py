"""What Lightning trains: an adapted model, its loss, its optimizer, and how it went."""

import math
import time
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

import medpeft

from ..data.batches import Batch
from ..errors import TrainerError
from ..settings import Settings
from ..tasks import Task


class Finetuning(lightning.LightningModule):
    """An adapted model in training.

    Args:
        model: after `medpeft.apply`.
        network: what is called: the model, or on kept features its rest.
        settings: of the run.
        task: says what the loss and the scores are.
        weights: of the loss, None for equal ones.

    Attributes:
        history: one record an epoch: `train_loss`, `val_loss`, `val_SCORE`, `seconds`.
        step_seconds: how long each batch took, without waiting for its images.
        peak: of the memory in bytes, and what was measured.
        outputs: what the task keeps of outputs and targets (N, …) of the last validation and test, whole on
            every process.
    """

    def __init__(
        self,
        model: nn.Module,
        network: nn.Module,
        settings: Settings,
        task: Task,
        weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network, self.settings, self.task = network, settings, task
        self.watched = f"val_{task.score}"
        # Not a child: the network has its parameters already.
        self.whole = (model,)
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)
        # A checkpoint holds what trains; the rest is as it was built.
        self.strict_loading = False
        self.history: list[dict[str, float]] = []
        self.step_seconds: list[float] = []
        self.outputs: dict[str, Batch] = {}
        self.peak = (0, "")
        self._seen: list[Batch] = []
        self._sharded = False
        self._begun = self._step_begun = 0.0

    @property
    def best_epoch(self) -> int:
        """The first epoch, counted from 1, with the highest validation score; 0 before the first."""
        scores = [record[self.watched] for record in self.history]
        return scores.index(max(scores)) + 1 if scores else 0

    def stops_early(self) -> bool:
        """Say whether as many epochs as the settings have patience for were no better than one before."""
        return len(self.history) - self.best_epoch >= self.settings.patience

    def configure_model(self) -> None:
        """Shard the blocks one by one, then the rest, for FSDP2: one block at a time is whole in memory."""
        if self.settings.strategy != "fsdp2" or self._sharded:
            return
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for child in self.network.children():
            if isinstance(child, (nn.Sequential, nn.ModuleList)):
                for block in child:
                    if any(True for _ in block.parameters()):
                        fully_shard(block, mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        self._sharded = True

    def configure_optimizers(self) -> Any:
        """Make AdamW, whose rate rises over the first steps and then falls to 0 in a cosine."""
        optimizer = torch.optim.AdamW(self.groups())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = warmup_cosine(optimizer, steps, self.settings.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def groups(self) -> list[dict[str, Any]]:
        """Give what the optimizer trains, each group with its rate and its weight decay."""
        settings = self.settings
        return medpeft.parameter_groups(
            self.whole[0], lr=settings.lr or 0.0, weight_decay=settings.weight_decay
        )

    def on_train_start(self) -> None:
        """Do nothing more where the run had stopped early before it was interrupted."""
        if self.stops_early():
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        """Note the time."""
        self._begun = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed what the model draws, dropout say, so that a run goes on as if it had never stopped."""
        place = [self.settings.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        self._step_begun = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the mean loss of a batch."""
        images, targets = batch
        loss = self.task.loss(self.network(images), targets, self.weights)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Note how long the batch took."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - self._step_begun)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the outputs."""
        self._see(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the outputs."""
        self._see(batch)

    def on_validation_epoch_end(self) -> None:
        """Score the validation part."""
        outputs, targets = self.outputs["val"] = self._gathered("val")
        self.log("val_loss", self.task.kept_loss(outputs, targets, self.weights))
        self.log(self.watched, self.task.watch(outputs, targets))

    def on_test_epoch_end(self) -> None:
        """Keep the test's outputs."""
        self.outputs["test"] = self._gathered("test")

    def on_train_epoch_end(self) -> None:
        """Note how the epoch went, and print a line.

        Raises:
            TrainerError: the loss is no longer a number.
        """
        values = self.trainer.callback_metrics
        record = {name: float(values[name]) for name in ("train_loss", "val_loss", self.watched)}
        record["seconds"] = time.perf_counter() - self._begun
        self.note(record, self.trainer.optimizers[0].param_groups[0]["lr"])
        if self.trainer.is_global_zero and not self.settings.quiet:
            print(self.line(), flush=True)

    def note(self, record: dict[str, float], rate: float) -> None:
        """Add the record of an epoch, which ended at a learning rate.

        Raises:
            TrainerError: the loss is no longer a number.
        """
        if not math.isfinite(record["train_loss"]):
            raise TrainerError(
                f"The training loss became {record['train_loss']} in epoch {len(self.history) + 1}. "
                f"Lower --lr (the rate is now {rate:.2g}) or check the images."
            )
        self.history.append(record)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes, the trainable parameters and the buffers, and how it went."""
        trained = {
            name
            for name, value in self.state_dict(keep_vars=True).items()
            if value.requires_grad or not isinstance(value, nn.Parameter)
        }
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name in trained}
        checkpoint["history"], checkpoint["step_seconds"] = self.history, self.step_seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over how it went."""
        if self.trainer.state.fn == "fit":
            self.history, self.step_seconds = list(checkpoint["history"]), list(checkpoint["step_seconds"])

    def see(self, outputs: Tensor, targets: Any, watched: bool) -> None:
        """Keep what the scores need of a batch; `watched`: what the score that chooses the epoch needs."""
        self._seen.append(self.task.keep(outputs, targets, watched))

    def _see(self, batch: Batch) -> None:
        images, targets = batch
        self.see(self.task.infer(self.network, images), targets, self.trainer.state.fn == "fit")

    def _gathered(self, part: str) -> Batch:
        """Join the outputs of all batches and processes, in the order of the images."""
        outputs, targets = self.joined()
        if self.trainer.world_size > 1:
            # Process r holds the images r, r + world, …, and the last ones may hold a repeated first image.
            count = len(self.trainer.datamodule.parts[part])  # type: ignore[attr-defined]
            # (W, n, …) → (n, W, …) → (n·W, …)
            outputs, targets = (
                torch.as_tensor(self.all_gather(own)).transpose(0, 1).flatten(0, 1)[:count]
                for own in (outputs, targets)
            )
        return outputs, targets

    def joined(self) -> Batch:
        """Join the outputs of all batches of this process."""
        outputs = torch.cat([one for one, _ in self._seen])
        targets = torch.cat([one for _, one in self._seen])
        self._seen.clear()
        return outputs, targets

    def line(self) -> str:
        """Say how the last epoch went."""
        epoch, record = len(self.history), self.history[-1]
        kept = "  best so far" if self.best_epoch == epoch else ""
        words, score = self.task.words[self.task.score], record[self.watched]
        losses = f"train loss {record['train_loss']:.4f}  val loss {record['val_loss']:.4f}"
        return f"epoch {epoch:>3}  {losses}  val {words} {score:.4f}  {record['seconds']:5.1f} s{kept}"


def warmup_cosine(optimizer: torch.optim.Optimizer, steps: int, share: float = 0.1) -> LambdaLR:
    """Raise the learning rate over a share of the steps, then lower it to 0 in a cosine."""
    warmup = max(1, int(share * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)
