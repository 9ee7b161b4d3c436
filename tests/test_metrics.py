"""FVU, calibration slope, L0 and dead features against their definitions in float64."""

import jax
import numpy as np
import pytest
from flax import nnx

import dense
from cltjax.batches import Batch, split_batches
from cltjax.clt import CLT
from cltjax.config import ModelConfig, TokensConfig
from cltjax.distributed import make_mesh
from cltjax.errors import UserError
from cltjax.metrics import Fit, Measured, calibrate, fit_sums, measure, membership_of, room, summary
from cltjax.normalisation import Normalisation, normalisation_of
from cltjax.step import Frozen
from cltjax.tokens import GROUPS, NormLimits, token_rules
from cltjax.wiring import wire
from stores import synthetic_store

F, K = 23, 3
USED = (0, 1)  # text and image


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A CLT with random weights, measured in batches with a short last one; and all test rows at once."""
    store = synthetic_store(tmp_path_factory.mktemp("metrics") / "store", rows=1009, layers=4, d=7)
    wiring = wire("all", 4, 1, 2)
    wired = (("site", list(wiring.sources)), ("mlp_out", list(wiring.targets)))
    # Limits so low that some rows of every modality are outliers.
    limits = NormLimits(*(tuple(np.quantile(store.norms(which)[:, at], 0.95, 0).tolist()) for which, at in wired))
    rules = token_rules(store, wiring.sources, wiring.targets, TokensConfig(), limits)
    scales = normalisation_of(store, wiring.sources, wiring.targets, rules)
    clt = CLT(wiring, ModelConfig(F, k=K), scales, jax.random.key(1))
    rng = np.random.default_rng(0)
    for W in clt.W_dec.values():
        W[...] = 0.1 * rng.normal(size=W[...].shape).astype(np.float32)
    clt.b_dec[...] = 0.1 * rng.normal(size=clt.b_dec[...].shape).astype(np.float32)
    # Every fifth is dead.
    clt.b_enc[...] = np.where(np.arange(F) % 5 == 2, -9, -0.7) * np.ones_like(clt.b_enc[...])
    batches = split_batches(store, wiring.sources, wiring.targets, rules.group, "test", 37)
    found = summary(measure(clt, batches, rules.used_groups), wiring.sources, wiring.targets, rules.used_groups)
    ((batch, group),) = split_batches(store, wiring.sources, wiring.targets, rules.group, "test", 10**6)
    assert set(group) == {0, 1, 2, 3}
    return scales, clt, found, batch, group


def test_fvu_and_slope_by_group(measured):
    scales, clt, found, batch, group = measured
    assert len(group) % 37 != 0 and found["rows"] == np.isin(group, USED).sum() < len(group)
    y, y_hat = batch.y.astype(np.float64), np.asarray(clt(batch.x), np.float64)
    for t, target in enumerate(clt.wiring.targets):
        members = {"all": np.isin(group, USED), **{name: group == m for name, m in GROUPS.items()}}
        assert found["targets"][str(target)].keys() == members.keys()
        for name, member in members.items():
            a, b, c = y[member, t], y_hat[member, t], scales.out_mean[t]
            got = found["targets"][str(target)][name]
            assert got["rows"] == member.sum()
            assert got["fvu"] == pytest.approx(np.square(a - b).sum() / np.square(a - c).sum(), rel=1e-4)
            a, b = a - a.mean(0), b - b.mean(0)
            assert got["slope"] == pytest.approx((a * b).sum() / np.square(b).sum(), rel=1e-3)
    assert found["fvu"]["image"] == pytest.approx(np.mean([by["image"]["fvu"] for by in found["targets"].values()]))


def test_l0_and_dead_are_over_used_rows(measured):
    _, clt, found, batch, group = measured
    values, indices = (np.asarray(part) for part in clt.encode(batch.x))
    used = np.isin(group, USED)
    for s, source in enumerate(clt.wiring.sources):
        active = values[s] > 0
        by = found["sources"][str(source)]
        assert by["l0"] == pytest.approx(active[used].sum(-1).mean())
        assert 0 < by["l0"] < K
        for name, m in GROUPS.items():
            assert by["l0_by_group"][name] == pytest.approx(active[group == m].sum(-1).mean())
        fired = np.bincount(indices[s][used][active[used]], minlength=F)
        assert by["dead"] == pytest.approx((fired == 0).mean()) and by["dead"] >= 4 / F
        rates = np.log10(fired[fired > 0] / used.sum())
        assert by["density"]["counts"] == np.histogram(rates, 70, (-7, 0))[0].tolist()
    counts = {name: int((group == m).sum()) for name, m in GROUPS.items()}
    assert found["rows_by_group"] == {name: counts[name] for name in ("text", "image")}
    assert found["left_out"] == {name: counts[name] for name in ("special", "outlier")}


def random_sums(seed: int, n: int = 503) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, y_hat [n, 3, 5] and groups [n]; rows of the outlier group are 1e5 times as large."""
    rng = np.random.default_rng(seed)
    y, y_hat = (rng.normal(size=(n, 3, 5)).astype(np.float32) for _ in range(2))
    group = rng.integers(0, 4, n).astype(np.uint8)
    y[group == 3] *= 1e5
    return y, y_hat, group


@pytest.mark.parametrize("used", [(0, 1), (0, 1, 2), (1,), (0, 1, 2, 3)])
def test_all_is_the_groups_that_are_trained_on(used: tuple[int, ...]):
    y, y_hat, group = random_sums(1)
    fit = Fit()
    for part in (slice(0, 123), slice(123, 503)):
        fit.add(fit_sums(y[part], y_hat[part], membership_of(group[part])))
    figures = fit.figures((2, 5, 7), used)
    chosen = np.isin(group, used)
    for t, by in enumerate(figures.values()):
        a, b = y[chosen, t].astype(np.float64), y_hat[chosen, t].astype(np.float64)
        assert by["all"]["rows"] == chosen.sum()
        assert by["all"]["fvu"] == pytest.approx(np.square(a - b).sum() / np.square(a).sum(), rel=1e-5)
        # Outliers that are left out are a million times too large to hide in the others' sums.
        assert (by["all"]["fvu"] > 1.5) == (3 not in used) and by["outlier"]["rows"] == (group == 3).sum()
    assert list(figures) == ["2", "5", "7"]


def test_summary_counts_used_rows_only():
    """Two sources of four features; what fires, and how much is active, by hand."""
    y, y_hat, group = random_sums(2, 11)
    group[:] = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    found = Measured()
    found.fit.add(fit_sums(y, y_hat, membership_of(group)))
    fired = np.array([[7, 1, 0, 0], [0, 0, 0, 2]])
    active = np.array([[6, 1], [2, 1], [40, 50], [60, 70]])
    found.firing.add(fired, active, [3, 4, 2, 2])
    by = summary(found, (0, 4), (1, 2, 3), (0, 1))
    assert by["rows"] == 7 and by["rows_by_group"] == {"text": 3, "image": 4}
    assert by["left_out"] == {"special": 2, "outlier": 2}
    assert [one["l0"] for one in by["sources"].values()] == [pytest.approx(8 / 7), pytest.approx(2 / 7)]
    assert [one["dead"] for one in by["sources"].values()] == [0.5, 0.75] and by["dead"] == 0.625
    assert by["sources"]["4"]["l0_by_group"]["special"] == 25 and by["l0"] == pytest.approx(5 / 7)
    counts = np.array(by["sources"]["0"]["density"]["counts"])
    assert np.flatnonzero(counts).tolist() == [61, 69]  # 1/7 and 7/7 of the rows: bins of a tenth of a decade
    all_used = summary(found, (0, 4), (1, 2, 3), (0, 1, 2, 3))
    assert all_used["rows"] == 11 and all_used["left_out"] == {}
    assert all_used["sources"]["0"]["l0"] == pytest.approx(108 / 11)


def test_fvu_is_not_clamped_and_slope_shows_overcounting():
    """Three sources that each predict the whole target: FVU 4, slope 1/3. A constant prediction has no slope."""
    rng = np.random.default_rng(3)
    y = rng.normal(size=(500, 1, 5)).astype(np.float32)
    membership = membership_of(rng.integers(0, 3, 500))
    figures = []
    for y_hat in (3 * y, np.full_like(y, 0.5)):
        fit = Fit()
        for part in (slice(0, 123), slice(123, 500)):
            fit.add(fit_sums(y[part], y_hat[part], membership[:, part]))
        figures.append(fit.figures((4,), (0, 1, 2))["4"]["all"])
    assert figures[0]["fvu"] == pytest.approx(4, rel=1e-5) and figures[0]["slope"] == pytest.approx(1 / 3, rel=1e-5)
    assert figures[1]["fvu"] > 1 and figures[1]["slope"] is None


def test_a_group_without_rows_is_left_out():
    y, y_hat, group = random_sums(4)
    fit = Fit()
    fit.add(fit_sums(y, y_hat, membership_of(np.zeros_like(group))))
    by = fit.figures((1, 2, 3), USED)["1"]
    assert by.keys() == {"all", "text"} and by["all"] == by["text"]
    assert fit.figures((1, 2, 3), (1, 2))["1"].keys() == {"text"}  # none of the rows is trained on


def with_thresholds(activation, slots=5, **sizes):
    """A CLT of which tokens have more active features than it has slots for; rows of several groups with it."""
    wiring = wire("all", 3, 0, 2)
    rng = np.random.default_rng(7)
    scales = Normalisation(*(rng.uniform(0.5, 2, shape).astype(np.float32) for shape in ((3, 7), 3, (3, 7), 3)))
    shape = ModelConfig(**{"features": F, "k": (2, 3, 5), "activation": activation, "slots": slots} | sizes)
    clt = CLT(wiring, shape, scales, jax.random.key(2))
    for W in (clt.W_enc, clt.b_enc, *clt.W_dec.values()):
        W[...] = rng.normal(size=W[...].shape).astype(np.float32)
    clt.cut[...] = np.array([1, 2, 3], np.float32)

    def batch(n):
        rows = (rng.normal(1, 2, (n, 3, 7)).astype(np.float32) for _ in range(2))
        return Batch(*rows), rng.integers(0, 4, n).astype(np.uint8)

    return clt, [batch(n) for n in (29, 29, 12)]


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
@pytest.mark.parametrize("shape", ["1x1", "2x1"])
def test_all_features_above_their_thresholds_are_measured(activation, shape):
    """However many a token has: slots bound training only."""
    clt, batches = with_thresholds(activation)
    measured = measure(clt, batches, USED, mesh=make_mesh(shape))
    x, y = (np.concatenate([getattr(batch, which) for batch, _ in batches]).astype(np.float64) for which in "xy")
    group = np.concatenate([group for _, group in batches])
    weights = {"W_enc": clt.W_enc[...], "b_enc": clt.b_enc[...], "W_dec": {s: W[...] for s, W in clt.W_dec.items()}}
    if activation == "jumprelu":
        weights["log_threshold"] = clt.log_threshold[...]
    weights = dense.as_float64(weights)
    normal = (x - clt.in_mean[...]) / np.asarray(clt.in_std[...], np.float64)[:, None]
    tau = np.asarray(clt.cut[...], np.float64) if activation == "batchtopk" else None
    codes = dense.encode(weights, normal, dense.Rule(activation, clt.k, F, tau=tau), clt.wiring).codes
    used = np.isin(group, USED)
    assert (codes[:, used] > 0).sum(-1).max() > clt.slots
    assert (measured.firing.fired == (codes[:, used] > 0).sum(1)).all()
    assert (measured.firing.active == [[(codes[s, group == m] > 0).sum() for s in range(3)] for m in range(4)]).all()
    y_hat = dense.decode_codes(weights["W_dec"], np.zeros((3, 7)), codes, clt.wiring)
    error = np.square((y - clt.out_mean[...]) / np.asarray(clt.out_std[...])[:, None] - y_hat).sum(-1)
    np.testing.assert_allclose(measured.fit.error, [error[group == m].sum(0) for m in range(4)], rtol=1e-4)


def in_strata(batches, strata):
    """Rows of the groups 0 and 1 as one stratum or as two; the others belong to none."""
    one = [(batch, np.where(group < 2, 0, 7).astype(np.uint8)) for batch, group in batches]
    return one if strata == 1 else batches


@pytest.mark.parametrize("activation", ["batchtopk", "topk_joint"])
@pytest.mark.parametrize("shape", ["1x1", "2x4"])
@pytest.mark.parametrize("shares", [(1.0,), (0.8, 0.2)])
def test_thresholds_leave_k_features_on_average(activation, shape, shares):
    """The k N-th largest rank of the used rows exactly, by source or over all: not of the candidates alone. Where the
    tokens are trained on in other shares than the rows have, the average is over those."""
    clt, batches = with_thresholds(activation, features=24)
    batches = in_strata(batches, len(shares))
    cut = calibrate(clt, lambda: iter(batches), shares, make_mesh(shape))
    x = np.concatenate([batch.x for batch, _ in batches])
    stratum = np.concatenate([stratum for _, stratum in batches])
    weight = np.zeros(len(stratum))
    for number, share in enumerate(shares):
        weight[stratum == number] = share / (stratum == number).sum()
    rank = np.asarray(clt.rank(clt.pre_activations(clt.normalise_inputs(x))))
    # Other products round otherwise.
    active, fewer = ((rank >= np.float32(1 + by) * cut[:, None, None]).sum(-1) @ weight for by in (-1e-6, 1e-6))
    k = np.array([2.0, 3.0, 5.0])
    if activation == "topk_joint":
        assert len(set(cut.tolist())) == 1
        active, fewer, k = active.sum(), fewer.sum(), k.sum()
    assert (active >= k - 1e-9).all() and (fewer < k - 1e-9).all() and (active - fewer <= weight.max() + 1e-9).all()
    used = weight > 0
    if len(shares) == 1:
        assert active * used.sum() == pytest.approx(k * used.sum(), rel=1e-12)
    else:
        plain = (rank >= np.float32(1 - 1e-6) * cut[:, None, None])[:, used].sum(-1).mean(1)
        assert np.abs(plain - np.array([2, 3, 5])).max() > 0.05  # the shares matter
    assert (np.sort(rank, -1)[:, used, -clt.slots - 1] > cut[:, None]).any()  # tokens with more than the slots hold


def test_thresholds_where_nearly_nothing_is_positive():
    clt, batches = with_thresholds("batchtopk", k=5)
    clt.b_enc[...] = clt.b_enc[...] - 1e3
    assert (calibrate(clt, lambda: iter(batches), (0.3, 0.7), make_mesh("1x1")) == 0).all()
    first = [(batch, np.zeros_like(group)) for batch, group in batches]
    with pytest.raises(UserError, match="val rows are lacking"):
        calibrate(clt, lambda: iter(first), (0.3, 0.7), make_mesh("1x1"))


@pytest.mark.parametrize("shape", ["1x1", "2x4"])
@pytest.mark.parametrize("strata", [1, 2])
def test_room_for_a_frozen_run(monkeypatch: pytest.MonkeyPatch, shape, strata):
    """As many slots as most tokens of each stratum and source need."""
    monkeypatch.setattr("cltjax.metrics.ENOUGH", 0.9)
    clt, batches = with_thresholds("batchtopk", features=24)
    graph, arrays = nnx.split(clt)
    wider = [(Batch(batch.x[:, [2, 0, 1]], batch.y), group % strata) for batch, group in batches]
    frozen = Frozen(graph, (1, 2, 0), ((0, 0),))
    active = np.concatenate([np.asarray((clt.codes(batch.x) > 0).sum(-1)) for batch, _ in batches], 1)
    stratum = np.concatenate([stratum for _, stratum in wider])
    parts = [active[:, stratum == number] for number in range(strata)]
    for step in (1, 8):
        monkeypatch.setattr("cltjax.metrics.SLOT_STEP", step)
        (found,) = room((frozen,), (arrays,), iter(wider), make_mesh(shape))
        assert found is not None
        slots, share = found
        shares = [min(float((part <= n).mean(1).min()) for part in parts) for n in range(25)]
        needed = next(n for n in range(25) if shares[n] >= 0.9)
        expected = min(24, -(-needed // step) * step)
        assert slots == expected and share == pytest.approx(shares[expected])
        assert clt.slots < needed < 24 and (share < 1) == (step == 1)
    topk, _ = with_thresholds("topk", features=24)
    other = Frozen(nnx.graphdef(topk), (0, 1, 2), ((0, 0),))
    held = nnx.state(topk), arrays
    assert room((other, frozen), held, iter(wider), make_mesh(shape)) == [None, found]
    assert room((other,), held[:1], iter(()), make_mesh(shape)) == [None]
