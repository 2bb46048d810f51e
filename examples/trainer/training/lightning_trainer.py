"""Lightning's `Trainer`, as the settings ask for it: devices, checkpoints, early stopping, loggers."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from ..errors import TrainerError
from ..settings import Settings


def make_trainer(
    settings: Settings, watched: str, callbacks: Sequence[lightning.Callback] = ()
) -> lightning.Trainer:
    """Make Lightning's `Trainer`.

    Args:
        settings: of the run.
        watched: the score of the validation part that chooses the epoch; the higher the better.
        callbacks: further ones.

    Raises:
        TrainerError: the devices cannot be had.
    """
    checkpoints = Path(str(settings.output)) / "checkpoints"
    best = ModelCheckpoint(checkpoints, "best", monitor=watched, mode="max", enable_version_counter=False)
    last = ModelCheckpoint(checkpoints, "last", enable_version_counter=False)
    stop = EarlyStopping(watched, mode="max", patience=settings.patience, check_finite=False)
    return bare_trainer(settings, [stop, best, last, *callbacks], loggers(settings))


def bare_trainer(
    settings: Settings, callbacks: Sequence[lightning.Callback] = (), loggers: Sequence[Logger] = ()
) -> lightning.Trainer:
    """Make Lightning's `Trainer` with no callbacks and loggers but these: without any it writes nothing.

    Raises:
        TrainerError: the devices cannot be had.
    """
    strategy: Any = settings.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=settings.devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    try:
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=strategy,
            precision=settings.precision,
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            callbacks=list(callbacks),
            logger=list(loggers),
            enable_checkpointing=bool(callbacks),
            default_root_dir=Path(str(settings.output)),
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise TrainerError(
            f"--accelerator {settings.accelerator} --devices {settings.devices} cannot be had: {error}"
        ) from error


def loggers(settings: Settings) -> list[Logger]:
    """Make the loggers: a CSV always, others by name.

    Raises:
        TrainerError: the package of one is not installed.
    """
    folder = Path(str(settings.output))
    found: list[Logger] = [CSVLogger(folder, "logs")]
    for name in settings.logger:
        try:
            match name:
                case "tensorboard":
                    found.append(TensorBoardLogger(folder, "tensorboard"))
                case "wandb":
                    found.append(WandbLogger(folder.name, folder, project="medpeft"))
                case "mlflow":
                    found.append(MLFlowLogger("medpeft", folder.name, mlflow_server(folder)))
        except ImportError as error:
            raise TrainerError(f"--logger {name} needs its package: pip install {name}. ({error})") from error
    return found


def mlflow_server(folder: Path) -> str:
    """Name the MLflow server of the environment, else a database in the run's folder."""
    server = os.environ.get("MLFLOW_TRACKING_URI")
    if server:
        return server
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder.resolve() / 'mlflow.db'}"


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Lightning's advice about workers and folders out of the output; errors stay."""
    names = ("lightning.pytorch", "lightning.fabric")
    levels = [logging.getLogger(name).level for name in names]
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
