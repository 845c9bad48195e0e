"""Where a training is watched: updates for any callable, and ready ones for TensorBoard, Weights & Biases and MLflow.

>>> losses = []
>>> watch = lambda update: losses.append(update.loss)  # bla.fit(wrapped, "photos/", callback=watch)
>>> watch(Update("module", 1, 1, 0.5))
>>> losses
[0.5]

No package is imported until its function is called; :func:`lightning` is for a training loop of Lightning's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from bla.explanations.explanation import Explanation, gallery
from bla.model.classifier import ExplainableClassifier, explainable
from bla.model.images import ImageLike


class Update(NamedTuple):
    """How a training goes: after each step, and once more at the end of an epoch.

    Attributes
    ----------
    stage: ``head``, ``module`` or ``continued``.
    step: of the whole training, from 1.
    epoch: of the stage, from 1.
    loss: of the batch; at the end of an epoch the mean over it.
    agreement: at the end of an epoch of the module's stage, the share of images (of validation, else at most 256 that
        are trained on) whose selected cells give the class that all cells give; else None.
    size: there, the mean number of selected cells.
    """

    stage: str
    step: int
    epoch: int
    loss: float
    agreement: float | None = None
    size: float | None = None

    def values(self) -> dict[str, float]:
        """The numbers by names such as ``module/loss``, and those of an epoch's end such as ``module/agreement``.

        >>> Update("module", 8, 1, 0.5, 0.9, 7.5).values()
        {'module/epoch_loss': 0.5, 'module/agreement': 0.9, 'module/size': 7.5}
        """
        if self.agreement is None or self.size is None:
            return {f"{self.stage}/loss": self.loss}
        named = {"epoch_loss": self.loss, "agreement": self.agreement, "size": self.size}
        return {f"{self.stage}/{name}": value for name, value in named.items()}


Callback = Callable[[Update], None]
"""What a training calls with each update."""


def tensorboard(writer: Any) -> Callback:
    """Log to TensorBoard: ``writer`` is a ``SummaryWriter``, or the folder of a new one."""
    if isinstance(writer, (str, Path)):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(writer)

    def log(update: Update) -> None:
        for name, value in update.values().items():
            writer.add_scalar(name, value, update.step)
        if update.agreement is not None:
            writer.flush()

    return log


def wandb(run: Any) -> Callback:
    """Log to Weights & Biases: ``run`` is what ``wandb.init()`` returns."""
    return lambda update: run.log(update.values(), step=update.step)


def mlflow(client: Any = None) -> Callback:
    """Log to MLflow's active run: ``client`` is the module ``mlflow``, by default imported."""
    if client is None:
        client = importlib.import_module("mlflow")
    return lambda update: client.log_metrics(update.values(), step=update.step)


def lightning(
    photos: Sequence[ImageLike], classifier: Callable[[Any], nn.Module] = lambda module: module, **options: Any
) -> Any:
    """A Lightning callback that explains the same photos after each epoch, and logs picture, agreement and size.

    The picture goes to TensorBoard's, Weights & Biases' or MLflow's logger; one without pictures gets the numbers.
    The network trains on undisturbed: a copy of it is explained.

    Parameters
    ----------
    photos: the fixed batch.
    classifier: gives the network of the LightningModule, ``lambda module: module.net`` say.
    options: of :func:`bla.explainable`, such as ``classes`` and ``transform``.
    """
    try:
        from lightning.pytorch.callbacks import Callback as Base
    except ImportError:
        from pytorch_lightning.callbacks import Callback as Base

    class Explanations(Base):  # type: ignore[misc]
        """Explains a fixed batch of photos after each epoch."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            network = classifier(module)
            wrapped = network if isinstance(network, ExplainableClassifier) else explainable(network, **options)
            training = wrapped.training
            try:
                found = wrapped.eval().explain(photos)
            finally:
                wrapped.train(training)
            for logger in trainer.loggers if trainer.is_global_zero else ():
                _log_explanations(logger, found, trainer.global_step)

    return Explanations()


def _log_explanations(logger: Any, found: Sequence[Explanation], step: int) -> None:
    agreed = sum(bool(each.agrees) for each in found) / len(found)
    size = sum(each.size for each in found) / len(found)
    logger.log_metrics({"explanations/agreement": agreed, "explanations/size": size}, step=step)
    picture, experiment = gallery(found), logger.experiment
    if hasattr(experiment, "add_image"):  # TensorBoard
        import numpy as np

        experiment.add_image("explanations", np.asarray(picture), step, dataformats="HWC")
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image("explanations", [picture], step=step)
    elif hasattr(experiment, "log_image"):  # MLflow
        experiment.log_image(logger.run_id, picture, f"explanations/{step}.png")
