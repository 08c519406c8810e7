"""The blocks in a plain loop: classification alone at first, then the teacher's lessons."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import batch, network, scenes


def main(steps: int = 6, start: int = 3) -> nn.Module:
    # Yours: network, data, optimiser. `start`: where the baseline has converged.
    student, pool = network(num_classes=4), scenes(16, seed=0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, weight_decay=5e-4)

    # Ours.
    teacher = pixelss.EMATeacher(student)
    region, bank = pixelss.ClassRegionMask(), pixelss.PrototypeBank(num_classes=4)
    rcl, mal = pixelss.RegionalContrastiveLoss(), pixelss.MultiScaleAttentiveLoss()

    for step in range(steps):
        images, tags, _ = batch(pool[step % 2 * 8 : step % 2 * 8 + 8])
        student_out = pixelss.multi_scale_forward(student, images)
        loss = torch.stack([bce(o.logits, tags) for o in student_out]).mean()
        if step == start:
            teacher = pixelss.EMATeacher(student)  # from the converged baseline
        if step >= start:
            teacher_out = pixelss.multi_scale_forward(teacher, images)
            mask = region(pixelss.msinf_cam([o.cam for o in teacher_out], tags), tags)
            bank.update(teacher_out[1].features, mask)
            loss = loss + rcl(student_out[1].features, mask, bank.prototypes, bank.filled)
            cams = [
                [pixelss.normalize_cam(o.cam) for o in out]
                for out in (student_out, teacher_out)
            ]
            loss = loss + mal(*cams, tags)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        print(f"step {step}: loss {loss.item():.3f}")
    return student


if __name__ == "__main__":
    main()
