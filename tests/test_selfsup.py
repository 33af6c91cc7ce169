"Pre-training and matching across modules: what one stage writes, the next one reads; work is saved where it is claimed."
import json
import time

import numpy as np
import pytest
import torch

from synapse_nb.core import SynapseError, rng, set_seed
from synapse_nb.models.base import EncoderModel, Head
from synapse_nb.models.match import MatchModel, clip_loss, match_step
from synapse_nb.models.zoo import create_model
from synapse_nb.selfsup.losses import nt_xent
from synapse_nb.selfsup.mae import MAE, MAEEncoder, evaluate_mae, load_mae, mae_step, save_mae
from synapse_nb.selfsup.masking import WienerInterpolator, block_mask, expand_mask, interpolate, make_mask, masked_scores
from synapse_nb.selfsup.probes import make_classifier, reset_copy
from synapse_nb.selfsup.tfc import TFC


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize("n,ratio,min_len", [(52, 0.75, 3), (13, 0.5, 2), (5, 0.9, 1), (2, 0.5, 4), (125, 0.1, 20)])
def test_every_row_hides_the_same_number_and_never_all(kind, n, ratio, min_len):
    for seed in range(20):
        m = make_mask(kind, 9, n, ratio, min_len, torch.Generator().manual_seed(seed))
        counts = m.sum(1)
        assert m.shape == (9, n) and len(set(counts.tolist())) == 1 and 0 < counts[0] < n


def test_blocks_cover_every_place():
    m = torch.cat([block_mask(64, 20, 0.5, 3, torch.Generator().manual_seed(s)) for s in range(40)]).float().mean(0)
    assert m.min() > 0.1 and m[3:-3].min() > 0.4 and m.max() < 0.75


@pytest.mark.parametrize("n_chans,n_times,patch", [(1, 8, 4), (3, 208, 4), (7, 50, 16), (22, 500, 16)])
def test_mae_takes_any_channel_count_and_length(n_chans, n_times, patch):
    m = MAE(n_chans, n_times, patch)
    out = m(torch.randn(2, n_chans, n_times))
    assert out["pred"].shape == (2, n_chans, n_times) and torch.isfinite(out["loss"])
    assert m.encoder(torch.randn(2, n_chans, n_times)).shape == (2, m.encoder.n_tokens, m.encoder.d_model)


def test_loss_ignores_what_was_visible():
    set_seed(0)
    m, x = MAE(3, 40, 4).eval(), torch.randn(2, 3, 40)
    mask = make_mask("random", 2, 10, 0.5, generator=torch.Generator().manual_seed(1))
    out = m(x, mask)
    h = expand_mask(mask, 4, 40)[:, None].expand_as(x)
    assert torch.allclose(out["loss"], (out["pred"] - x)[h].pow(2).mean())
    changed = torch.where(h, x + 5, x)
    assert torch.allclose(m(changed, mask)["pred"], out["pred"])            # hidden values never reach the prediction


def test_channel_masks_count_hidden_channels():
    m = MAE(8, 40, 4, mask_ratio=0, channel_ratio=0.5)
    out = m(torch.randn(4, 8, 40))
    assert (out["hidden"].all(2).sum(1) == 4).all() and m.mask == "random"
    both = MAE(8, 40, 4, mask_ratio=0.5, channel_ratio=0.25)(torch.randn(4, 8, 40))["hidden"]
    assert both.float().mean() == pytest.approx(1 - 0.5 * 0.75)


def test_checkpoint_goes_into_classifier_and_matching(tmp_path):
    set_seed(0)
    m = MAE(5, 48, 4)
    enc = load_mae(save_mae(m, tmp_path / "mae")).encoder
    x = torch.randn(3, 5, 48)
    assert torch.equal(enc(x), m.encoder(x))
    assert EncoderModel(enc, Head(enc.n_tokens, enc.d_model, 4))(x).shape == (3, 4)
    match = MatchModel(enc, 16)
    out = match_step(match, {"x": x, "target": torch.randn(3, 16), "image_id": torch.tensor([4, 4, 9])})
    out["loss"].backward()
    assert match.logit_scale.grad is not None and enc.embed.weight.grad is not None


def test_same_seed_same_weights_and_loss():
    def run():
        set_seed(5)
        m = MAE(4, 40, 4); opt = torch.optim.AdamW(m.parameters(), lr=1e-3); x = torch.from_numpy(rng(0, "x").normal(size=(16, 4, 40)).astype(np.float32))
        for _ in range(3): loss = mae_step(m, {"x": x})["loss"]; opt.zero_grad(); loss.backward(); opt.step()
        return loss.item(), m.out.weight.detach().clone()
    (a, wa), (b, wb) = run(), run()
    assert a == b and torch.equal(wa, wb)


def test_only_visible_tokens_cost():
    "Encoder on a quarter of the tokens: well under half of the CPU time of all (ABBA pairs, median)."
    e, x = MAEEncoder(8, 512, 4, d_model=128, depth=4), torch.randn(8, 8, 512)
    few = torch.arange(32).expand(8, -1)
    def cpu(v):
        t = time.process_time(); e(x, v); return time.process_time() - t
    with torch.no_grad():
        cpu(None); cpu(few)
        pairs = [(cpu(few), cpu(None), cpu(None), cpu(few)) for _ in range(5)]
    assert np.median([(a + d) / (b + c) for a, b, c, d in pairs]) < 0.6


def test_wiener_is_the_conditional_mean():
    "On one channel of an AR(1) process, the gap's filling is the textbook one, and no other interpolation is better."
    g = rng(1, "ar")
    x = np.zeros((3000, 1, 24)); x[:, 0, 0] = g.normal(size=3000) / np.sqrt(1 - .81)
    for t in range(1, 24): x[:, 0, t] = 0.9 * x[:, 0, t - 1] + g.normal(size=3000)
    hidden = np.zeros((3000, 24), bool); hidden[:, 12] = True
    w = WienerInterpolator(noise=0).fit(x).fill(x, hidden)[:, 0, 12]
    exact = 0.9 / 1.81 * (x[:, 0, 11] + x[:, 0, 13])
    assert np.corrcoef(w, exact)[0, 1] > 0.999
    hid = expand_mask(block_mask(3000, 24, 0.5, 3), 1, 24).numpy()
    r2 = {k: masked_scores(interpolate(x, hid, k), x, hid)["r2"] for k in ("linear", "cubic", "pchip")}
    assert masked_scores(WienerInterpolator().fit(x).fill(x, hid), x, hid)["r2"] > max(r2.values())


def _ar(n, seed, n_chans=4, n_times=42):
    g = rng(seed, "ar windows"); e = g.normal(size=(n, n_chans, n_times)); x = e.copy()
    for t in range(1, n_times): x[..., t] = 0.9 * x[..., t - 1] + np.sqrt(1 - .81) * e[..., t]
    return np.einsum("ck,nkt->nct", np.linalg.cholesky(0.5 + 0.5 * np.eye(n_chans)), x).astype(np.float32)


def test_with_its_linear_part_an_untrained_network_is_the_wiener_interpolator(tmp_path):
    "42 samples in patches of 4: the padding of the last patch says nothing. The answer survives a checkpoint, and training moves only what is not linear."
    set_seed(0)
    train, x = _ar(300, 0), _ar(60, 1)
    m = MAE(4, 42, 4, mask="block", min_len=2, mask_ratio=0.5, linear=True)
    with pytest.raises(SynapseError, match="fit_linear"): m(torch.from_numpy(x))
    m.fit_linear(train)
    mask = make_mask("block", 60, 11, 0.5, 2, torch.Generator().manual_seed(0))
    hidden = expand_mask(mask, 4, 42).numpy()
    exact = WienerInterpolator().fit(train).fill(x, hidden)
    ours = m.eval()(torch.from_numpy(x), mask)
    assert np.abs(ours["pred"].detach().numpy() - exact).max() < 1e-3
    assert torch.equal(load_mae(save_mae(m, tmp_path / "m")).eval()(torch.from_numpy(x), mask)["pred"], ours["pred"])
    before = {k: v.clone() for k, v in m.linear.state_dict().items()}
    opt = torch.optim.AdamW(m.parameters(), lr=1e-3)
    mae_step(m, {"x": torch.from_numpy(x)})["loss"].backward(); opt.step()
    assert all(torch.equal(v, before[k]) for k, v in m.linear.state_dict().items()) and m.out.weight.abs().max() > 0
    changed = torch.where(torch.from_numpy(hidden)[:, None], torch.from_numpy(x) + 5, torch.from_numpy(x))
    assert torch.allclose(m(changed, mask)["pred"][torch.from_numpy(hidden)[:, None].expand(-1, 4, -1)], m(torch.from_numpy(x), mask)["pred"][torch.from_numpy(hidden)[:, None].expand(-1, 4, -1)])


def test_a_quiet_start_learns_what_no_polynomial_knows():
    "An AR(1) process under correlated sensors has a known best answer, the Wiener interpolator's; half a thousand steps of a tiny network come within an eighth of it. From Xavier's output layer they take three times as long."
    set_seed(0)
    train, x = _ar(4000, 0), _ar(200, 1)
    m = MAE(4, 42, 3, mask="block", min_len=2, mask_ratio=0.5, out_init=0.)
    opt = torch.optim.AdamW(m.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=500, pct_start=.15)
    for _ in range(500): loss = mae_step(m, {"x": torch.from_numpy(train[torch.randint(0, 4000, (64,)).numpy()])})["loss"]; opt.zero_grad(); loss.backward(); opt.step(); plan.step()
    r2 = {r["model"]: r["r2"] for r in evaluate_mae(m, x, train[:500])}
    assert r2["mae"] > max(r2[k] for k in ("nearest", "linear", "cubic", "pchip", "akima")) and r2["mae"] > 0.87 * r2["wiener"], r2


def test_evaluation_hides_in_many_ways():
    "Few long blocks are harder than many short ones: a score on one number of blocks would be that draw's score."
    seen = []
    class Spy(MAE):
        def reconstruct(self, x, mask): seen.append(mask); return super().reconstruct(x, mask)
    set_seed(0)
    evaluate_mae(Spy(4, 42, 2, mask="block", min_len=2), _ar(96, 2), baselines=False)
    blocks = (torch.cat(seen).int().diff(dim=1, prepend=torch.zeros(96, 1, dtype=torch.int)) == 1).sum(1)
    assert len(blocks.unique()) >= 4


def test_evaluation_rows_and_seed():
    set_seed(0)
    m, x = MAE(3, 40, 4, mask="block", min_len=2), rng(0, "w").normal(size=(20, 3, 40)).astype(np.float32)
    rows = evaluate_mae(m, x, x)
    assert [r["model"] for r in rows] == ["mae", "nearest", "linear", "cubic", "pchip", "akima", "wiener"] and rows == evaluate_mae(m, x, x)


def test_repeats_are_no_negatives():
    e = torch.eye(4)[[0, 0, 1, 2]]
    p = e.clone().requires_grad_()
    clip_loss(p, e, 100.0, torch.tensor([7, 7, 8, 9])).backward()
    assert p.grad.abs().max() < 1e-3
    with pytest.raises(SynapseError, match="out_dim"): clip_loss(p, e[:, :3])
    with pytest.raises(SynapseError, match="2 trials"): nt_xent(e[:1], e[:1])


@pytest.mark.parametrize("make", [lambda: MAE(5, 48, 4, linear=True), lambda: TFC(5, 48, depth=1), lambda: create_model("conformer", 5, 48, 2, 100.)], ids=["mae", "tfc", "zoo"])
def test_the_control_starts_as_a_new_network_would(make):
    "Weight by weight what the constructor gives at that seed: torch's own defaults are another start than the autoencoder's."
    set_seed(0); made = make().encoder
    torch.manual_seed(7); fresh = make().encoder.state_dict()
    with torch.no_grad(): [p.add_(1) for p in made.parameters()]                                    # "trained"
    control = reset_copy(made, 7)
    assert all(torch.equal(v, fresh[k]) for k, v in control.state_dict().items()) and control.training == made.training
    scratch = make_classifier(made, 2, "scratch", seed=7).encoder.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in scratch.items())


def test_an_encoder_that_nobody_can_make_anew_is_refused():
    class Own(torch.nn.Module):
        def __init__(self): super().__init__(); self.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(SynapseError, match="Own.*make"): reset_copy(Own())
    assert not torch.equal(reset_copy(layer := torch.nn.Linear(3, 3), 1).weight, layer.weight)


def test_a_network_that_starts_from_what_is_near_fills_gaps_sooner(tmp_path):
    "Same process, steps and seeds as above, fewer of them. Checkpoints know whether they have it; those from before do not."
    train, x, got = _ar(2000, 0), _ar(200, 1), {}
    for near in (False, True):
        set_seed(0); m = MAE(4, 42, 3, mask="block", min_len=2, mask_ratio=0.5, out_init=0., near=near); opt = torch.optim.AdamW(m.parameters(), 2e-3, betas=(0.9, 0.95))
        for _ in range(150): loss = mae_step(m, {"x": torch.from_numpy(train[torch.randint(0, 2000, (64,)).numpy()])})["loss"]; opt.zero_grad(); loss.backward(); opt.step()
        got[near] = evaluate_mae(m, x, baselines=False)[0]["r2"]
    assert got[True] > 1.2 * got[False] > 0, got
    again = load_mae(save_mae(m, tmp_path / "m")); assert torch.equal(again.encoder(torch.from_numpy(x[:3])), m.encoder(torch.from_numpy(x[:3])))
    config = tmp_path / "old/config.json"; old = MAE(4, 42, 3, preset="small", near=False); save_mae(old, tmp_path / "old")
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "near"}))
    assert load_mae(tmp_path / "old").encoder.blocks[0].near is None and MAE(4, 42, 3, preset="small").encoder.blocks[0].near is not None
