"Contrastive losses and their gradients over 7 samples, on one process or split unevenly over ranks, for tests/test_training.py."
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as td
from torch import nn

from synapse_nb.dist import init_from_env, is_main, leave, rank, reduce_sum, share_of, world_size
from synapse_nb.models.match import clip_loss, siglip_loss
from synapse_nb.selfsup.contrast import queue_loss
from synapse_nb.selfsup.losses import nt_xent
from synapse_nb.stimuli.embed import clip_step
from synapse_nb.train.checkpoint import write_tensors


class TwoTowers(nn.Module):
    "What transformers' CLIP gives, without the towers."
    def __init__(self):
        super().__init__()
        self.image, self.text, self.logit_scale = nn.Linear(6, 4), nn.Linear(6, 4), nn.Parameter(torch.tensor(1.0))

    def forward(self, input_ids, attention_mask, pixel_values):
        i, t = (nn.functional.normalize(f(x), dim=1) for f, x in ((self.image, pixel_values), (self.text, input_ids)))
        logits = self.logit_scale.exp() * i @ t.T
        return SimpleNamespace(image_embeds=i, text_embeds=t, logits_per_image=logits, logits_per_text=logits.T)


def main(out):
    init_from_env()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    n, x, y, ids = 7, torch.randn(7, 6), torch.randn(7, 6), torch.tensor([0, 1, 2, 1, 3, 4, 0])
    mine = torch.tensor(share_of(range(n)))
    model = TwoTowers()
    results = {}
    losses = {
        "nt_xent": lambda i, t: nt_xent(i, t), "clip": lambda i, t: clip_loss(i, t, 5.0), "clip ids": lambda i, t: clip_loss(i, t, 5.0, ids[mine]),
        "siglip": lambda i, t: siglip_loss(i, t), "queue": lambda i, t: queue_loss(i, t, ids[mine], 5.0),
        "clip_step": lambda i, t: clip_step(model, {"input_ids": y[mine], "attention_mask": None, "pixel_values": x[mine], "caption_id": ids[mine]})["loss"]}
    for name, loss in losses.items():
        model.zero_grad()
        value = loss(model.image(x[mine]), model.text(y[mine])) * len(mine) / n
        value.backward()
        results[name] = torch.tensor(reduce_sum(value.item()))
        for k, p in model.named_parameters():
            if p.grad is None: continue
            if world_size() > 1: td.all_reduce(p.grad)
            results[f"{name} {k}"] = p.grad.clone()
    hits = clip_step(model, {"input_ids": y[mine], "attention_mask": None, "pixel_values": x[mine], "caption_id": ids[mine]})["top1"]
    results["top1"] = torch.tensor(reduce_sum(float(hits.sum())))
    if is_main(): write_tensors(Path(out) / f"ranks{world_size()}.safetensors", results)
    assert rank() < world_size()
    leave()


if __name__ == "__main__": main(sys.argv[1])
