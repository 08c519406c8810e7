"""Several processes, one loss.

    torchrun --nproc_per_node=2 several_gpus.py

The bank and the metrics reduce over the processes by themselves. The losses do not: a mean
over one process's pixels is not the mean over all, so sum, and divide by what all counted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.parallel import DistributedDataParallel

import pixelss

sys.path.insert(0, str(Path(__file__).parent.parent))
from small import batch, network, scenes


def over_processes(count: Tensor) -> Tensor:
    """Return the sum over the processes divided by their number: DDP averages gradients."""
    total = count.float().clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / dist.get_world_size()


def main() -> None:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu")
    torch.manual_seed(0)
    # A network with batch norms: freeze_norm(net), and broadcast_buffers=False, for a step
    # runs several forwards.
    student = DistributedDataParallel(network(num_classes=4).to(device))
    teacher = pixelss.EMATeacher(
        student
    )  # looks through the wrapper; the same on every process
    region, bank = (
        pixelss.ClassRegionMask(),
        pixelss.PrototypeBank(num_classes=4).to(device),
    )
    rcl = pixelss.RegionalContrastiveLoss(reduction="sum")
    mal = pixelss.MultiScaleAttentiveLoss(reduction="sum")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02)

    for step in range(3):
        images, tags, _ = (
            x.to(device) for x in batch(scenes(4, seed=10 * step + rank))
        )  # your sampler
        student_out = pixelss.multi_scale_forward(student, images)
        # Shards of one size: a mean of means is the mean.
        loss = torch.stack([bce(o.logits, tags) for o in student_out]).mean()
        teacher_out = pixelss.multi_scale_forward(teacher, images)
        mask = region(pixelss.msinf_cam([o.cam for o in teacher_out], tags), tags)
        bank.update(
            teacher_out[1].features, mask
        )  # every process calls it, with an empty shard too
        pixels = over_processes(torch.tensor(mask.numel(), device=device))
        loss = (
            loss + rcl(student_out[1].features, mask, bank.prototypes, bank.filled) / pixels
        )
        cams = [
            [pixelss.normalize_cam(o.cam) for o in out]
            for out in (student_out, teacher_out)
        ]
        pairs = over_processes(tags.sum() * mask[0].numel())
        loss = loss + mal(*cams, tags) / pairs
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)

    ours = torch.cat(
        [x.flatten() for x in (bank.prototypes, *teacher.module.state_dict().values())]
    )
    theirs = ours.clone()
    dist.broadcast(theirs, src=0)
    if not torch.equal(ours, theirs):
        raise SystemExit("the processes have drifted apart")
    if rank == 0:
        print(f"{dist.get_world_size()} processes agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
