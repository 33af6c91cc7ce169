"Contracts of models/: every model on any montage, references (PyWavelets, torch_geometric, the written loop), causality, missing modalities, merged weights."
import copy

import mne
import numpy as np
import pytest
import torch
from torch import nn

from synapse_nb.core import SynapseError
from synapse_nb.models.base import REGISTRY, Head, call_model, classify_step, predict, toy_score
from synapse_nb.models.fusion import FusionModel
from synapse_nb.models.layers import ChannelMerger, GATv2, channel_positions, layout2d
from synapse_nb.models.merging import MergedTrunk, regmean, slim
from synapse_nb.models.wavelet import dwt1d, dwt2d, idwt1d, idwt2d, packet2d
from synapse_nb.models.zoo import create_encoder, create_model, list_models, model_options

NAMES = sorted(list_models())
BROKEN_GRAPHS = ("lstm_cnn", "wavelet_cnn", "wavelet_cnn_2d", "wavelet_cnn_gat")             # torch.compile goes around LSTMs, and around PyWavelets, which makes the matrices
ONE_TOKEN_CAUSAL = ("transformer", "conformer", "hybrid", "lstm_cnn", "cnn_transformer_gat", "wavelet_cnn_gat")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def chs(n):
    "A standard cap's channels as MNE describes them."
    names = mne.channels.make_standard_montage("biosemi64").ch_names[:n]
    return mne.create_info(names, 100.0, "eeg").set_montage("biosemi64", on_missing="ignore")["chs"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("C,T,fs", [(1, 24, 50.0), (4, 129, 256.0), (63, 100, None), (22, 208, 1000.0), (160, 140, 200.0)])
def test_any_montage_and_window(name, C, T, fs):
    m = create_model(name, C, T, 3, fs)
    assert m(torch.randn(2, C, T)).shape == (2, 3)
    assert m.eval().encode(torch.randn(2, C, T)).shape == (2, m.encoder.n_tokens, m.encoder.d_model)
    assert torch.isfinite(m(torch.zeros(2, C, T))).all()                     # a dead recording gives numbers, not NaN


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_eval_repeats(name):
    m = create_model(name, 8, 64, 3, 64, chs(8))
    x, y = torch.randn(6, 8, 64), torch.randint(0, 3, (6,))
    out = classify_step(m, {"x": x, "y": y})
    out["loss"].backward()
    dead = [n for n, p in m.named_parameters() if p.requires_grad and (p.grad is None or not torch.isfinite(p.grad).all())]
    assert not dead, dead                                                    # an idle parameter stalls distributed training
    m.eval()
    with torch.no_grad(): assert torch.equal(m(x), m(x)) and torch.allclose(m(x)[:2], m(x[:2]), atol=1e-4)       # a trial's answer does not depend on its batch
    other = create_model(name, 8, 64, 3, 64, chs(8)).eval()
    other.load_state_dict(m.state_dict())
    with torch.no_grad(): assert torch.allclose(other(x), m(x), atol=1e-6)
    with torch.no_grad(): assert torch.allclose(copy.deepcopy(m)(x), m(x))


def test_names_options_and_words_of_errors():
    assert {"eegnet", "mlp", "linear", "spatial_conv", "lf_cnn", "var_cnn", "wavelet_cnn", "stgate", "transformer", "brain_module", "lstm_cnn", "hybrid"} <= set(NAMES)
    for name, doc in list_models().items(): assert len(doc) > 20 and name in REGISTRY and model_options(name)
    for bad, word in ((lambda: create_model("eegnett", 4, 50, 2), "eegnet"), (lambda: create_model("mlp", 4, 50, 2, pick=[0]), "picks"), (lambda: create_model("mlp", 0, 50, 2), "channel"),
                      (lambda: create_model("mlp", 4, 50, 2)(torch.zeros(1, 5, 50)), "5, 50"), (lambda: create_model("mlp", 4, 50, 2, chs_info=chs(8)), "chs_info")):
        with pytest.raises(SynapseError, match=word): bad()


def test_predict_and_batches():
    m = create_model("mlp", 4, 50, 3, 100)
    X = np.random.default_rng(0).normal(size=(70, 4, 50)).astype("float32")
    p = predict(m, X, batch_size=32)
    assert p.shape == (70, 3) and np.allclose(p.sum(1), 1, atol=1e-5) and m.training
    assert np.allclose(p, predict(m, X, batch_size=7), atol=1e-5)
    b = create_model("brain_module", 4, 50, 3, 100, n_subjects=2).eval()
    batch = {"x": torch.tensor(X[:4]), "subject": torch.tensor([0, 1, 5, -1])}
    out = call_model(b, batch)
    assert torch.allclose(out[2], b(batch["x"][2:3])[0], atol=1e-5) and torch.allclose(out[3], b(batch["x"][3:4])[0], atol=1e-5)    # strangers get the mean person


@pytest.mark.parametrize("mode", ["zero", "symmetric", "periodization"])
@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym9", "bior6.8", "coif3", "rbio2.4"])
def test_dwt_equals_pywavelets(mode, wavelet):
    import pywt
    for shape in ((5, 63, 100), (2, 3, 31, 17), (1, 9, 1030)):
        x = torch.randn(*shape, dtype=torch.float64)
        lo, hi = pywt.dwt(x.numpy(), wavelet, mode)
        c = dwt1d(x, wavelet, mode)
        assert np.abs(c.numpy() - np.stack([lo, hi], -2)).max() < 1e-6
        assert np.abs(idwt1d(c, wavelet, mode).numpy() - pywt.idwt(lo, hi, wavelet, mode)).max() < 1e-6
        a, (h, v, d) = pywt.dwt2(x.numpy(), wavelet, mode)
        c2 = dwt2d(x, wavelet, mode)
        assert np.abs(c2.numpy() - np.stack([a, h, v, d], -3)).max() < 1e-6
        assert (idwt2d(c2, wavelet, mode, shape[-2:]) - x).abs().max() < 1e-6


def test_dwt_gradients_and_the_source_shape():
    for f in (lambda t: dwt1d(t, "db3", "symmetric"), lambda t: dwt2d(t, "db2", "zero"), lambda t: packet2d(t, "haar", "zero"), lambda t: idwt1d(dwt1d(t, "sym4", "periodization"), "sym4", "periodization", 8)):
        assert torch.autograd.gradcheck(f, torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True))
    x = torch.randn(7, 63, 100)
    assert dwt2d(x, "sym9").shape == (7, 4, 32, 50) and packet2d(x).shape == (7, 16, 16, 25)
    assert (idwt2d(dwt2d(x, "sym9"), "sym9", size=(63, 100)) - x).abs().max() < 1e-5             # float32 too
    long = torch.randn(2, 2000, requires_grad=True)
    dwt1d(long, "db4", "periodization").square().sum().backward()
    assert torch.allclose(long.grad, 2 * long, atol=1e-4)                                        # orthogonal: energy is kept


def test_gatv2_equals_torch_geometric():
    pyg = pytest.importorskip("torch_geometric.nn")
    for heads, concat, share in ((1, True, False), (3, True, False), (4, False, True)):
        n, ours = 20, GATv2(8, 5, heads, concat, share=share)
        theirs = pyg.GATv2Conv(8, 5, heads, concat=concat, share_weights=share)
        with torch.no_grad():
            theirs.lin_l.load_state_dict(ours.lin_l.state_dict()); theirs.lin_r.load_state_dict(ours.lin_r.state_dict())
            theirs.att.copy_(ours.att[None]); theirs.bias.copy_(ours.bias.normal_())
        mask = (torch.rand(n, n) < 0.3) | torch.eye(n, dtype=torch.bool)
        x = torch.randn(2, n, 8, requires_grad=True)
        edge_index = torch.stack(list(mask.nonzero(as_tuple=True))[::-1])                        # source j, target i
        want = torch.stack([theirs(v, edge_index) for v in x])
        got = ours(x, mask)
        assert (got - want).abs().max() < 1e-5
        g1, g2 = torch.autograd.grad(got.square().sum(), x)[0], torch.autograd.grad(want.square().sum(), x)[0]
        assert (g1 - g2).abs().max() < 1e-4


@pytest.mark.parametrize("mode", GATv2.MODES)
@pytest.mark.parametrize("heads,concat", [(1, True), (3, False)])
def test_graph_attention_variants_node_by_node(mode, heads, concat):
    "The update rules of arXiv:2305.16196, written out for each node and head; a mask and a table of the same edges agree."
    g, x = GATv2(6, 4, heads, concat, activation="softplus", mode=mode), torch.randn(2, 9, 6)
    nn.init.normal_(g.lin_l.bias); nn.init.normal_(g.lin_r.bias); nn.init.normal_(g.bias)
    table = torch.stack([torch.cat([torch.tensor([i]), torch.tensor([j for j in torch.randperm(9).tolist() if j != i][:3])]) for i in range(9)])
    mask = torch.zeros(9, 9, dtype=torch.bool).scatter(1, table, True)
    left, right, own = (lin(x).view(2, 9, heads, 4) for lin in (g.lin_l, g.lin_r, g.theta_n or g.lin_r))
    out = torch.zeros(2, 9, heads, 4)
    for b in range(2):
        for i in range(9):
            hears = [j for j in table[i].tolist() if mode == "att" or j != i]
            for h in range(heads):
                alpha = torch.stack([g.att[h] @ nn.functional.softplus(left[b, j, h] + right[b, i, h]) for j in hears]).softmax(0)
                out[b, i, h] = sum(a * left[b, j, h] for a, j in zip(alpha, hears)) + (0 if mode == "att" else own[b, i, h])
    want = (out.flatten(2) if concat else out.mean(2)) + g.bias
    assert torch.allclose(g(x, table), want, atol=1e-5) and torch.allclose(g(x, mask), want, atol=1e-5)
    assert torch.isfinite(g(x, torch.zeros(9, 9, dtype=torch.bool))).all()                       # a node without edges


@pytest.mark.parametrize("name", ONE_TOKEN_CAUSAL)
def test_causal_by_perturbation(name):
    e = create_encoder(name, 6, 160, 250, chs(6), causal=True).eval()
    x = torch.randn(2, 6, 160)
    frame = {"transformer": 10, "conformer": getattr(e, "hop", 0)}.get(name) or e.hop
    with torch.no_grad():
        for t in (40, 95, 150):
            y = x.clone(); y[..., t:] = torch.randn(2, 6, 160 - t)
            moved = (e(x) - e(y)).abs().amax((0, 2)) > 1e-5
            first = int(moved.nonzero()[0]) if moved.any() else e.n_tokens
            assert first >= t // frame, (name, t, first)


@pytest.mark.parametrize("how", ["concat", "gated", "attention"])
def test_fusion_bears_a_missing_modality(how):
    m = FusionModel(create_encoder("spatial_conv", 30, 80, 100), create_encoder("mlp", 10, 60, 75), 3, how)
    meg, eeg = torch.randn(6, 30, 80), torch.randn(6, 10, 60)
    out = classify_step(m, {"meg": meg, "eeg": eeg, "y": torch.randint(0, 3, (6,))})
    out["loss"].backward()
    assert torch.isfinite(out["loss"]) and all(p.grad is not None and torch.isfinite(p.grad).all() for p in m.parameters())
    m.eval()
    with torch.no_grad():
        assert torch.isfinite(m(meg, None)).all() and torch.isfinite(m(None, eeg)).all()
        assert torch.allclose(m(meg, eeg, torch.tensor([[True, False]] * 6)), m(meg, None), atol=1e-5)
        junk = torch.where(torch.rand(6, 10, 60) > 0.5, 1e6, -1e6)
        assert torch.allclose(m(meg, junk, torch.tensor([[True, False]] * 6)), m(meg, None), atol=1e-4)      # what is absent cannot speak
    with pytest.raises(SynapseError): m(None, None)


def test_merging_open_gates_are_the_ensemble():
    make = lambda: nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))
    a, b, x = make(), make(), torch.randn(9, 12)
    merged = MergedTrunk(a, b).open_gates().eval()
    assert torch.allclose(merged(x), (a(x) + b(x)) / 2, atol=1e-6)
    assert [p.shape for p in slim(MergedTrunk(a, b)).parameters()] == [p.shape for p in a.parameters()]
    assert torch.allclose(regmean([a, a], [[x], [x]])(x), a(x), atol=1e-4)                       # two equal parents: the parent


def test_layout_serves_cap_and_helmet():
    xy = layout2d(channel_positions(chs(64)))
    assert xy.shape == (64, 2) and xy.min() >= 0 and xy.max() <= 1
    t, p = np.meshgrid(np.linspace(0.05, 1.9, 12), np.linspace(0, 2 * np.pi, 13)[:-1])
    helmet = 0.12 * np.c_[(np.sin(t) * np.cos(p)).ravel(), (np.sin(t) * np.sin(p)).ravel(), np.cos(t).ravel()] + [0, 0.01, 0.04]
    flat = layout2d(helmet)
    angle = np.hypot(*(flat - 0.5).T)
    assert np.corrcoef(angle, t.ravel())[0, 1] > 0.999                                           # angle from the top becomes distance from the centre
    w = ChannelMerger(flat, 5, 8).eval().weights()
    assert torch.allclose(w.sum(1), torch.ones(5), atol=1e-5)


def test_head_shapes():
    for kind in Head.KINDS: assert Head(7, 5, 3, kind)(torch.randn(2, 7, 5)).shape == (2, 3)


@pytest.mark.parametrize("C,T,n,per_class", [(4, 80, 2, 2), (12, 50, 3, 1), (1, 60, 2, 1)])
def test_tangent_network_starts_as_the_classical_decoder(C, T, n, per_class):
    from pyriemann.estimation import XdawnCovariances
    from pyriemann.tangentspace import TangentSpace
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from synapse_nb.evaluate.baselines import oas_covariance
    from synapse_nb.models.base import toy_trials
    toy = dict(n_chans=C, n_times=T, n_outputs=n, snr=0.4)
    (X, y), (X2, _) = toy_trials(300, **toy), toy_trials(200, split="test", **toy)
    coordinates = make_pipeline(XdawnCovariances(nfilter=per_class, estimator=oas_covariance), TangentSpace())
    whole = make_pipeline(coordinates, StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)).fit(X.astype(float), y)
    m = create_model("tangent", C, T, n, 100, bin_s=0, per_class=per_class).start_from(X, y, C=1.0).eval()
    with torch.no_grad(): z = m.encoder.tangent(torch.tensor(X2)).numpy()
    want = coordinates.transform(X2.astype(float))
    assert np.abs(np.abs(z) - np.abs(want)).max() < 2e-3 * np.abs(want).max()                    # a filter's sign is free
    assert np.abs(predict(m, X2) - whole.predict_proba(X2.astype(float))).max() < 5e-3
    with pytest.raises(SynapseError, match="class"): m.start_from(X, np.zeros_like(y))


def test_tangent_network_on_dead_and_dependent_channels():
    from synapse_nb.models.base import toy_trials
    X, y = toy_trials(200, n_chans=6, n_times=50, snr=0.6)
    X = X - X.mean(1, keepdims=True)                                                             # average reference: one dimension fewer
    X[:, 2] = 0
    m = create_model("tangent", 6, 50, 2, 100).start_from(X, y)
    out = classify_step(m, {"x": torch.tensor(X), "y": torch.tensor(y)})
    out["loss"].backward()
    assert out["accuracy"] > 0.8 and all(torch.isfinite(p.grad).all() for p in m.parameters())
    with torch.autocast("cpu", torch.bfloat16): assert torch.allclose(m.eval()(torch.tensor(X)).float(), m(torch.tensor(X)).float(), atol=0.1) and torch.isfinite(m(torch.tensor(X))).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_true_labels_and_shuffled_labels(name):
    from synapse_nb.train.loop import fit
    make = lambda: create_model(name, 16, 100, 2, 100)
    assert toy_score(make(), fit, n_epochs=20, n_trials=600, n_chans=16, snr=0.6, lr=2e-3) > 0.7
    # 22 models: the 99.9 % binomial interval of 1000 trials, Bonferroni over the models, is 0.5 +- 0.066
    assert abs(toy_score(make(), fit, shuffle=True, n_epochs=4, n_trials=300, n_chans=16, snr=0.6) - 0.5) < 0.066


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_export(name):
    "torch.export of the whole model, for one batch size and for any: the exported program answers as the model does."
    m, x = create_model(name, 8, 64, 3, 64, chs(8)).eval(), torch.randn(4, 8, 64)
    for shapes in (None, {"x": {0: torch.export.Dim("batch", min=2, max=512)}}):
        exported = torch.export.export(m, (x,), dynamic_shapes=shapes).module()
        for z in (x,) if shapes is None else (x, torch.randn(7, 8, 64)): assert torch.allclose(exported(z), m(z), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compile(name):
    "torch.compile in one graph (but for BROKEN_GRAPHS): same gradients. (The tracing is the model's part; the code generator, minutes for all models, is tried on two.)"
    torch._dynamo.reset()
    m, batch = create_model(name, 8, 64, 3, 64, chs(8)).eval(), {"x": torch.randn(4, 8, 64), "y": torch.arange(4) % 3}
    m.zero_grad(); classify_step(m, batch)["loss"].backward()
    want = {n: p.grad.clone() for n, p in m.named_parameters()}
    compiled = torch.compile(m, fullgraph=name not in BROKEN_GRAPHS, backend="inductor" if name in ("eegnet", "tangent") else "aot_eager")
    m.zero_grad(); classify_step(compiled, batch)["loss"].backward()
    for n, p in m.named_parameters(): assert torch.allclose(p.grad, want[n], atol=1e-4), n
