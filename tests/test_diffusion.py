"Embedding, codec, denoiser and decoder together: exact where exactness is claimed, the same picture from the same seed."
import numpy as np
import pytest
import torch

from synapse_nb.core import SynapseError, rng, set_seed
from synapse_nb.diffusion.codec import PictureCodec, analyse, codec_step, synthesise
from synapse_nb.diffusion.decoder import PictureDecoder, decoder_step, draw_latents, load_decoder
from synapse_nb.diffusion.prior import EmbeddingPrior
from synapse_nb.stimuli.embed import clip_dataset, clip_step, embed_images, embed_texts, load_clip, make_tiny_clip
from synapse_nb.stimuli.images import make_pictures


@pytest.fixture(scope="module")
def pictures(): return make_pictures(4, seed=0)


@pytest.fixture(scope="module")
def decoder(pictures):
    set_seed(0)
    e = rng(0, "emb").normal(size=(len(pictures.images), 12)).astype(np.float32)
    return PictureDecoder(PictureCodec(width=8, depth=1).fit_scale(pictures.images), 12, size=(16, 32)).fit_scale(e), e


@pytest.mark.parametrize("wavelet", ["haar", "bior2.2", "db2", "bior4.4"])
def test_round_trip_with_true_details_is_exact(pictures, wavelet):
    assert np.array_equal(synthesise(*analyse(pictures.images, wavelet), wavelet), pictures.images)


@pytest.mark.parametrize("bad", [np.zeros((2, 64, 64, 3)), np.zeros((2, 62, 62, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros((2, 64, 32, 3), np.uint8)])
def test_codec_names_what_it_cannot_take(bad):
    with pytest.raises(SynapseError, match="uint8"): analyse(bad)


def test_details_learn_and_freeze(pictures, decoder):
    set_seed(0)
    codec = PictureCodec(width=8, depth=1).fit_scale(pictures.images)
    data, opt = codec.arrays(pictures.images), torch.optim.AdamW(codec.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        out = codec_step(codec, data); opt.zero_grad(); out["loss"].backward(); opt.step(); losses.append(out["loss"].item())
    assert losses[-1] < 0.97 * losses[0]
    assert not any(p.requires_grad for p in decoder[0].codec.parameters())


def test_decoder_trains_saves_and_draws_the_same(pictures, decoder, tmp_path):
    model, e = decoder
    data, opt = model.arrays(pictures.images, e), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    set_seed(0)
    losses = []
    for _ in range(12):
        out = decoder_step(model.train(), data); opt.zero_grad(); out["loss"].backward(); opt.step(); losses.append(out["loss"].item())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    a = model.sample(e[:5], n_steps=4, seed=3)
    assert a.shape == (5, 64, 64, 3) and a.dtype == np.uint8
    assert np.abs(a.astype(int) - load_decoder(model.save(tmp_path / "dec")).sample(e[:5], n_steps=4, seed=3)).max() <= 1
    assert np.abs(a[[4, 1]].astype(int) - model.sample(e[[4, 1]], n_steps=4, seed=3)).max() <= 1              # order and neighbours do not matter
    assert not np.array_equal(a, model.sample(e[:5], n_steps=4, seed=4))
    assert np.abs(a.astype(int) - model.sample(e[:5] * 7, n_steps=4, seed=3)).max() <= 1                      # only the direction counts


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_every_prediction_type_steps_and_samples(pictures, prediction):
    set_seed(0)
    e = rng(0, "e").normal(size=(len(pictures.images), 6)).astype(np.float32)
    model = PictureDecoder(PictureCodec(width=8, depth=1).fit_scale(pictures.images), 6, size=(16, 32), prediction=prediction).fit_scale(e)
    decoder_step(model, model.arrays(pictures.images, e))["loss"].backward()
    z = draw_latents(model, e[:2], n_steps=3, guidance_scale=1.5, noise_level=0.5)
    assert z.shape == (2, 3, 16, 16) and torch.isfinite(z).all()


def test_bad_embeddings_are_refused(decoder):
    with pytest.raises(SynapseError, match="12 numbers"): decoder[0].sample(np.zeros((2, 5)))
    with pytest.raises(SynapseError, match="fit_scale"): PictureDecoder(decoder[0].codec, 12, size=(16, 32)).sample(np.ones((1, 12)))


def test_prior_recovers_a_planted_slope():
    g = rng(0, "prior")
    t = g.normal(size=(4000, 5)) * [3, 2, 1, .5, .2]
    p = t * 2 + g.normal(size=t.shape) * t.std(0)                                             # signal 4 : noise 1 in variance -> slope 2 / 5
    prior = EmbeddingPrior(unit=False, ridge=0).fit(p, t)
    assert np.allclose(prior.slopes, 0.4, atol=0.03) and np.allclose(prior.r, np.sqrt(0.8), atol=0.02) and prior.noise_level == pytest.approx(0.5, abs=0.03)


def test_tiny_clip_learns_and_its_cache_follows_content(pictures, tmp_path):
    captions = pictures.table.caption.tolist()
    set_seed(0)
    model, processor = load_clip(make_tiny_clip(captions, tmp_path / "clip", patch_size=16, n_layers=1, d_model=32))
    data, opt = clip_dataset(processor, pictures.images, captions).__getitems__(range(len(captions))), torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = clip_step(model, data)["loss"].item()
    before = embed_images((model, processor), pictures.images, cache_dir=tmp_path / "cache")
    for _ in range(15): loss = clip_step(model, data)["loss"]; opt.zero_grad(); loss.backward(); opt.step()
    assert loss.item() < 0.8 * first
    after = embed_images((model, processor), pictures.images, cache_dir=tmp_path / "cache")
    assert not np.allclose(before, after) and len(list((tmp_path / "cache").glob("*.npy"))) == 2     # same folder name, other weights: another entry
    model.save_pretrained(tmp_path / "clip")
    assert np.allclose(embed_images(tmp_path / "clip", pictures.images), after, atol=1e-5)
    assert embed_texts(tmp_path / "clip", captions[:3]).shape == (3, 64)


def test_a_half_downloaded_model_is_named(tmp_path):
    folder = make_tiny_clip(["a cat"], tmp_path / "half", d_model=32, n_layers=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SynapseError, match="half"): load_clip(folder)
