"""The same as a LightningModule (python -m pip install lightning)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.utils.data import DataLoader

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import batch, network, scenes


class WeaklySupervised(lightning.LightningModule):
    """A CAM network with its teacher, bank and losses; all are in the checkpoint."""

    def __init__(
        self, student: nn.Module, num_classes: int, *, start: int, lr: float = 0.02
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, pixelss.EMATeacher(student)
        self.region, self.bank = (
            pixelss.ClassRegionMask(),
            pixelss.PrototypeBank(num_classes),
        )
        self.rcl, self.mal = (
            pixelss.RegionalContrastiveLoss(),
            pixelss.MultiScaleAttentiveLoss(),
        )
        self.sweep = pixelss.ThresholdSweep(num_classes)
        self.start, self.lr = start, lr

    def training_step(self, data: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        images, tags, _masks = data
        student_out = pixelss.multi_scale_forward(self.student, images)
        loss = torch.stack([bce(o.logits, tags) for o in student_out]).mean()
        if self.global_step >= self.start:
            teacher_out = pixelss.multi_scale_forward(self.teacher, images)
            mask = self.region(pixelss.msinf_cam([o.cam for o in teacher_out], tags), tags)
            self.bank.update(teacher_out[1].features, mask)
            loss = loss + self.rcl(
                student_out[1].features, mask, self.bank.prototypes, self.bank.filled
            )
            cams = [
                [pixelss.normalize_cam(o.cam) for o in out]
                for out in (student_out, teacher_out)
            ]
            loss = loss + self.mal(*cams, tags)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        # Until then the teacher is the student: it begins from the converged baseline.
        self.teacher.update(
            self.student, momentum=None if self.global_step > self.start else 0
        )

    def validation_step(self, data: tuple[Tensor, Tensor, Tensor], _: int) -> None:
        images, tags, masks = data
        outputs = pixelss.multi_scale_forward(self.student, images)
        self.sweep.update(pixelss.msinf_cam([o.cam for o in outputs], tags), masks)

    def on_validation_epoch_end(self) -> None:
        scores = self.sweep.compute()  # sums over the processes
        self.sweep.reset()
        self.log("miou", scores.miou[scores.best])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=self.lr, weight_decay=5e-4)


def main() -> None:
    batches: Any = [batch(scenes(8, seed=seed)) for seed in range(3)]
    loader: Any = DataLoader(batches, batch_size=None)
    model = WeaklySupervised(network(num_classes=4), num_classes=4, start=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet)
    trainer.fit(model, loader, loader)
    print(
        f"mIoU {trainer.callback_metrics['miou']:.3f},",
        f"classes in the bank: {int(model.bank.filled.sum())}",
    )


if __name__ == "__main__":
    main()
