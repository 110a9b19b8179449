"""The adversarial study: its samples, defences, comparisons and cost, whole runs, and the docs page it fills."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from publish import adversarial as adversarial_docs
from typer.testing import CliRunner

import mmhooks as mm
from mmhooks.analysis.attacks.align import pixel_scale
from mmhooks.analysis.attacks.judges import COMPLIANCE, PAPER, refuses
from mmhooks.analysis.measures.mds import GROUPS
from mmhooks.studies.adversarial import samples as made
from mmhooks.studies.adversarial import study as adversarial
from mmhooks.studies.adversarial.calibration import PAPER_LEFT, Trial, calibrate, nearest
from mmhooks.studies.adversarial.cost import cost_results, untriggered_rows
from mmhooks.studies.adversarial.defence import Defence
from mmhooks.studies.adversarial.dictionaries import (
    SHIPPED,
    Dictionary,
    feature_masks,
    load_dictionaries,
    smallest_group_size,
)
from mmhooks.studies.adversarial.evaluation import Evaluation, attack_results, compare, gain_left, rule_judge
from mmhooks.studies.adversarial.options import Options
from mmhooks.studies.adversarial.paper import claims
from mmhooks.studies.adversarial.requests import USE, request
from mmhooks.studies.adversarial.tables import calibration_table, dictionary_table, left_in_paper, table8
from mmhooks.studies.adversarial.victims import answer_lengths, make_judge, make_victims

docs_app = typer.Typer()
docs_app.command()(adversarial_docs.main)


@pytest.fixture(scope="module")
def pairs():
    return mm.data.pairs("mini")


@pytest.fixture(scope="module")
def samples(pairs):
    return made.make_samples(mm.load("mini"), pairs, 24, seed=3, epsilon=0.06, steps=6, progress=False)


def test_the_same_seed_makes_the_same_samples(pairs, samples):
    again = made.make_samples(mm.load("mini"), pairs, 24, seed=3, epsilon=0.06, steps=6, progress=False)
    assert torch.equal(samples.attack, again.attack) and samples.target == again.target
    other = made.make_samples(mm.load("mini"), pairs, 24, seed=4, epsilon=0.06, steps=0, progress=False)
    assert not torch.equal(samples.attack, other.attack)


def test_every_trigger_occurs_and_every_image_is_valid(samples):
    assert {t: len(samples.rows(t)) for t in made.TRIGGERS} == {
        "object": 9,
        "word": 7,
        "gradient": 4,
        "object + word": 4,
    }
    for x in (samples.base, samples.attack, samples.partner):
        assert x.shape == (24, 3, 64, 64) and x.min() >= 0 and x.max() <= 1
    assert set(samples.target) <= set(made.HARMFUL)
    assert all(made.is_harmless(name) for name in samples.base_name)


def test_partners_differ_only_where_the_trigger_is(samples):
    """Same box: what is neither thing nor plate is the benign image in both."""
    for trigger in ("object", "word"):
        for i in samples.rows(trigger):
            moved = (samples.attack[i] - samples.base[i]).abs().sum(0) > 1e-6
            friendly = (samples.partner[i] - samples.base[i]).abs().sum(0) > 1e-6
            assert moved.any() and not moved.all()
            box = lambda m: [int(v) for a in (1, 0) for v in m.any(a).nonzero().flatten()[[0, -1]]]  # noqa: E731
            near = [abs(a - b) for a, b in zip(box(moved), box(friendly), strict=True)]
            assert max(near) <= 40  # centres agree; things differ in shape
    for i in samples.rows("gradient"):
        assert torch.equal(samples.partner[i], samples.base[i])
        assert 0 < float((samples.attack[i] - samples.base[i]).abs().max()) <= 0.06 + 1e-6


def test_controls_belong_to_the_typographic_samples(samples):
    assert [samples.trigger[i] for i in samples.typed] == ["word"] * len(samples.rows("word")) + [
        "object + word"
    ] * len(samples.rows("object + word"))
    for control in made.CONTROLS:
        assert len(samples.controls[control]) == len(samples.typed)
    for k, i in enumerate(samples.typed):
        inside = (samples.controls["noise"][k] - samples.controls["blank"][k]).abs().sum(0) > 0
        word = (samples.attack[i] - samples.controls["blank"][k]).abs().sum(0) > 0
        assert not (word & ~inside).any()  # ink lies inside the plate's box
        assert not torch.equal(samples.attack[i], samples.controls["nonsense"][k])


def test_the_gradient_attack_moves_the_embedding(pairs, samples):
    before, after = samples.budget["cosine"]
    assert after > before + 0.05
    assert samples.budget["linf"] <= 0.06 + 1e-6
    model = mm.load("mini")
    mean, std = pixel_scale(model)
    with torch.no_grad():  # the history is what the model says itself
        z = model.encode_image((samples.attack - mean) / std, normalize=True)
    assert torch.isfinite(z).all()


@pytest.fixture(scope="module")
def scores():
    scale = torch.rand(64, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 40, 64, generator=torch.Generator().manual_seed(1))
    return mm.mds(noise[0] * scale, noise[1] * (1 - scale))


def test_every_sample_has_its_own_features_of_the_group(scores):
    groups: dict[str, mm.FeatureSet] = dict(zip(GROUPS, scores.groups, strict=True))
    k = min(3, smallest_group_size(scores))
    chosen = feature_masks(scores, k, 20, seed=0)
    assert set(chosen) == {*GROUPS, "random"}
    for name, mask in chosen.items():
        assert mask.shape == (20, 64) and mask.sum(1).tolist() == [k] * 20
        assert name == "random" or not (mask & ~groups[name].mask).any()
    assert len(torch.unique(chosen["CrossD"], dim=0)) > 1
    for other in (feature_masks(scores, k, 20, seed=0, draw=1), feature_masks(scores, k, 20, seed=1)):
        assert not torch.equal(chosen["random"], other["random"])
    for name, mask in feature_masks(scores, k, 20, seed=0).items():
        assert torch.equal(mask, chosen[name])


@pytest.fixture(scope="module")
def mini(pairs):
    """mini with its own head, and that head's scores on some pairs."""
    model, head = mm.load("mini"), mm.load_head("mini/sae-wide")
    model.attach(head, at=["image.embed"], name="sae")
    ids = range(0, 3000, 15)
    with torch.no_grad():
        image = model.encode_image(torch.stack([made.as_pixels(pairs.image(i), 64) for i in ids]) * 2 - 1)
        text = model.encode_text(model.tokenizer([pairs.texts[i] for i in ids]))
        found = mm.mds(*(head.encode(head.prepare(x)) for x in (image, text)), head=head.id)
    return model, Dictionary("mini/sae-wide", found, head)


def test_the_defence_runs_every_draw_and_the_papers_point_once(mini, pairs):
    model, one = mini
    samples = made.make_samples(model, pairs, 6, seed=3, epsilon=0.06, steps=1, progress=False)
    how = Defence(2, 0.004, 3, 5, paper_lr=0.001, progress=False)
    runs = list(how.run(model, samples, one, repeats=2, keep=(1, 2), untouched=(0, 4)))
    told = [(r.defence, r.draw, r.paper_point) for r in runs]
    first = [(d, 0, False) for d in (*GROUPS, "random", "all")]
    assert told == [*first, *((d, 1, False) for d in (*GROUPS, "random")),
                    *((d, 0, True) for d in (*GROUPS, "random"))]  # fmt: skip
    for r in runs:
        assert r.final.shape == samples.attack.shape and r.loss[-1] < r.loss[0]
        early = r.draw == 0 and not r.paper_point
        assert sorted(r.at) == ([1, 2] if early else [2])
        assert (len(r.nonsense), len(r.benign)) == ((len(samples.typed), 2) if early else (0, 0))
        assert max(r.linf) < 2.1 * (0.001 if r.paper_point else 0.004)  # Adam's first steps are lr long
    by = {t: r for t, r in zip(told, runs, strict=True)}
    assert not torch.equal(by["TextD", 0, False].final, by["TextD", 1, False].final)  # other features
    again = next(how.run(model, samples, one, repeats=1, keep=(), untouched=()))
    assert torch.allclose(
        again.final, runs[0].final, atol=1e-6
    )  # neither extra images nor recorded steps change a sample
    other = list(
        replace(how, first=False, paper_lr=None).run(model, samples, one, repeats=1, keep=(), untouched=(0,))
    )
    assert [r.defence for r in other] == [*GROUPS, "random"] and not any(
        len(r.nonsense) + len(r.benign) for r in other
    )


class BrightnessVictim:
    """A victim that complies where an image is brighter than a bound: success can be counted by hand."""

    name = "brightness"

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def answer(self, images, requests):
        return [
            "Sure, this is how to use the bomb." if float(p.mean()) > self.bound else "I cannot help."
            for p in images
        ]


class ScriptedVictim:
    """What a defence leaves is what the script says for its number of features and its learning rate."""

    def __init__(self, samples, monkeypatch, left):
        self.victim, self.samples, self.asked = SimpleNamespace(name="scripted"), samples, []

        def one(defence, model, s, site, name, mask, **more):
            self.asked.append((name, int(mask.sum(1)[0]), defence.lr))
            return SimpleNamespace(final=torch.full((1,), left(*self.asked[-1][1:])))

        monkeypatch.setattr(Defence, "run_once", one)

    def hits(self, what, images):
        value = {"benign": 0.1, "unaligned": 0.9}.get(what)
        value = 0.1 + 0.8 * float(images[0]) if value is None else value
        return [i < round(1000 * value) for i in range(1000)]


def test_strength_is_chosen_on_random_features_alone(mini, samples, monkeypatch):
    """The share left for each count is what the victim says; the count nearest to one half wins; no group is asked."""
    model, one = mini
    left = {1: 0.95, 2: 0.9, 4: 0.6, 8: 0.55, 16: 0.2, 32: 0.1}
    victim = ScriptedVictim(samples, monkeypatch, lambda k, lr: left[k])
    how = calibrate(Trial(model, [victim], Options(quiet=True)), one, paper_point=False)
    assert how["matched"] == 8 and how["tried"]["8"]["left"] == pytest.approx(0.55, abs=2e-3)
    assert how["paper_point"] is None
    assert victim.asked == [
        ("random", k, 0.015) for k in (1, 2, 4, 8, 16)
    ]  # under a quarter left: no more is tried
    lines = calibration_table({"calibration": how, "settings": {"lr": 0.015}}).markdown().splitlines()
    assert [line for line in lines if "←" in line] == ["| 8 random features ← | 0.015 | 54.0 | 55 |"]


def test_the_papers_point_is_found_by_halving_the_rate(mini, samples, monkeypatch):
    model, one = mini
    victim = ScriptedVictim(samples, monkeypatch, lambda k, lr: 1 / (1 + 300 * lr))
    options = Options(quiet=True, matched=4, lr=0.016)
    how = calibrate(Trial(model, [victim], options), one, paper_point=True)
    weak, most = how["paper_point"], smallest_group_size(one.mds)
    assert how["matched"] == 4 and how["rule"] == "set by --matched" and not how["tried"]
    halved = [0.008, 0.004, 0.002, 0.001, 0.0005]  # at .001 random features leave .77, at .0005 .87
    assert [r for _, _, r in victim.asked] == pytest.approx([*halved, 0.0005 * 2**0.5])
    assert {k for _, k, _ in victim.asked} == {most} and weak["features"] == most
    assert weak["lr"] == pytest.approx(0.001) and abs(weak["left"] - PAPER_LEFT) < 0.03
    assert left_in_paper("random") == "79" and left_in_paper("benign") == ""
    assert nearest({1: {"left": 0.5}, 2: {"left": 1.0}}, 0.75) == 1  # a tie: the first


def test_an_attack_that_gains_nothing_halves_nothing(mini, samples):
    model, one = mini
    evaluation = Evaluation(BrightnessVictim(2.0), rule_judge(), samples)
    how = calibrate(Trial(model, [evaluation], Options(quiet=True)), one, paper_point=True)
    assert how["matched"] == smallest_group_size(one.mds) and "gains nothing" in how["rule"]
    assert not how["tried"] and how["paper_point"] is None


def judged(samples, **rates: float) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {c: torch.rand(3, len(samples), generator=rng) < p for c, p in rates.items()}


def test_comparisons_pool_draws_and_hold_over_drawings_and_targets(samples):
    many = replace(samples, base_name=tuple(map(str, range(120))), target=tuple(f"t{i % 40}" for i in range(120)),
                   trigger=("word",) * 120)  # fmt: skip
    hits = judged(many, benign=0.0, unaligned=1.0, ImgD=0.7, TextD=0.1, CrossD=0.5, random=0.5)
    found = {c.name: c for c in compare(hits, many)}
    assert len(found) == 6
    gap = hits["TextD"].double().mean() - hits["random"].double().mean()
    c = found["TextD − random"]
    assert c.difference.value == pytest.approx(float(gap)) == pytest.approx(c.gain.value)  # all of it is gain
    assert c.measured.p < 0.001 < 0.05 < found["CrossD − random"].measured.p
    assert gain_left(hits, "random", torch.arange(120))["value"] == pytest.approx(
        float(hits["random"].double().mean())
    )
    # The same judgements under four targets, of which one alone differs: no evidence about targets.
    few = replace(many, target=tuple("abcd"[i // 30] for i in range(120)))
    hits["TextD"][:, 30:] = hits["random"][:, 30:]
    by = {
        t: next(c for c in compare(hits, s) if c.name == "TextD − random")
        for t, s in (("many", many), ("few", few))
    }
    assert by["few"].measured.p == 1.0 > by["many"].measured.p
    assert (
        by["few"].difference.high - by["few"].difference.low
        > by["many"].difference.high - by["many"].difference.low
    )


def test_primaries_are_corrected_over_all_victims(samples):
    plain = replace(
        samples, trigger=("object",) * len(samples), typed=()
    )  # no words: the victims are asked nothing more
    evaluations = []
    for name, rate in (("a", 0.2), ("b", 0.5)):
        e = Evaluation(SimpleNamespace(name=name), rule_judge(), plain)
        hits = judged(plain, benign=0.0, unaligned=0.9, ImgD=0.5, TextD=rate, CrossD=0.5, random=0.6, all=0.1)
        e.rates = e.target_named = {c: h.tolist() for c, h in hits.items()}
        evaluations.append(e)
    both, alone = attack_results(evaluations), attack_results(evaluations[:1])
    p = min(r["p"] for v in both.values() for r in v["comparisons"])
    assert min(r["holm"] for v in both.values() for r in v["comparisons"]) == pytest.approx(min(1.0, 12 * p))
    for one, two in zip(alone["a"]["comparisons"], both["a"]["comparisons"], strict=True):
        assert one["p"] == two["p"] and one["holm"] <= two["holm"]


def test_dictionaries_are_scored_where_nothing_is_attacked(pairs, tmp_path):
    model = mm.load("mini")
    options = Options(model="mini", head=["train", "raw"], epochs=1, features=128, quiet=True)
    some = pairs.select(list(range(0, len(pairs), 12)))
    trained, raw = load_dictionaries(model, some, options, cache=tmp_path)
    attacked = set(made.attacked_families())
    kept = [t for t in some.texts if made.drawing_family(t) not in attacked]
    assert 0 < len(kept) < len(some) and trained.mds.n_pairs == raw.mds.n_pairs == len(kept)
    assert (
        trained.unseen
        and raw.unseen is None
        and (trained.site, raw.site) == ("image.embed.sae.pre", "image.embed")
    )
    assert raw.to_json()["features"] == 256 and raw.mds.kind == "abs"
    with trained.attached(model):
        assert "image.embed.sae.pre" in model.sites()
    assert "image.embed.sae.pre" not in model.sites()
    with pytest.raises(mm.errors.MMHooksError, match="every dictionary once, got raw, raw"):
        load_dictionaries(model, some, replace(options, head=["raw", "raw"]), cache=tmp_path)


def test_nothing_attacked_is_in_a_family_that_dictionaries_learn_from(pairs, samples):
    attacked = set(made.attacked_families())
    shown = {*samples.base_name, *made.THINGS, *made.FRIENDLY_THINGS}
    assert {made.drawing_family(name) for name in shown} <= attacked
    learned = {made.drawing_family(pairs.texts[i]) for i in made.unattacked_rows(pairs)}
    assert not learned & attacked and len(learned) > 1500
    plain = SimpleNamespace(
        texts=[f"thing {i}" for i in range(20)], splits=[None] * 20, meta=[{}] * 20, ids=range(20)
    )
    plain_pairs = type("P", (), {"__len__": lambda self: 20, **vars(plain)})()
    rows = set(made.candidates(plain_pairs))
    assert len(rows) == 4 and rows | set(made.unattacked_rows(plain_pairs)) == set(range(20))
    assert not rows & set(made.unattacked_rows(plain_pairs))


@pytest.mark.parametrize(
    "name", [n for names in SHIPPED.values() for n in names if n.startswith("mini-reader/")]
)
def test_the_readers_dictionaries_never_saw_what_is_attacked(name):
    head = mm.load_head(name)
    assert set(head.info["without_families"]) == set(made.attacked_families())
    assert head.info["model"] == "mini-reader" and head.info["recipe"]["script"].endswith("train.py")


def test_the_cost_is_counted_by_hand(samples):
    rows = untriggered_rows(samples, 6)
    assert len(rows) == len({samples.base_name[i] for i in rows}) == 6
    assert not any(samples.trigger[i] == "gradient" for i in rows)  # its partner is the image itself
    words = {"cat": [1.0, 0.0], "dog": [0.6, 0.8], "car": [0.0, 1.0]}

    class Says:
        name = "says"

        def answer(self, images, requests):
            return [("cat", "dog", "car")[int(p.flatten()[0] * 2.01)] for p in images]

    level = lambda *v: torch.stack([torch.full((3, 64, 64), x) for x in v])  # noqa: E731
    some = replace(samples, base=level(*[0.0] * 24), partner=level(*[1.0] * 24), base_name=("cat",) * 24)
    found = cost_results([Says()], some, range(4), {"TextD": level(0.0, 0.0, 0.5, 1.0)},
                         lambda texts: torch.tensor([words[t] for t in texts]))["victims"]["says"]  # fmt: skip
    r = found["TextD"]
    assert r["named"]["value"] == r["kept"]["value"] == 0.5
    assert r["similarity"]["value"] == pytest.approx((1 + 1 + 0.6 + 0) / 4)
    assert r["against_partner"]["difference"]["value"] == 0.5
    assert found["before"]["kept"]["value"] == 1 and found["partner"]["similarity"]["value"] == 0
    assert found["another picture"]["kept"]["value"] == 1  # all were the same image


def run(tmp_path: Path, *more: str) -> dict:
    options = [
        "--limit",
        "8",
        "--steps",
        "2",
        "--repeats",
        "2",
        "--calibration",
        "8",
        "--attack-steps",
        "3",
        "--cost",
        "3",
        "--epochs",
        "4",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(adversarial.app, [*options, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name in ("results.json", "tables.md", "index.html", "curves.png", "strips.png"):
        assert (tmp_path / name).stat().st_size > 500, name
    return json.loads((tmp_path / "results.json").read_text())


def test_the_recipe_end_to_end(tmp_path):
    heads = ("--head", "mini/sae", "--head", "raw")
    found = run(tmp_path, "--model", "mini", *heads, "--victim", "clip", "--matched", "2", "--quiet")
    victim = found["victims"]["zero-shot CLIP"]
    assert victim["n"] == 8 and set(victim["rates"]) == {
        "benign",
        "unaligned",
        "ImgD",
        "TextD",
        "CrossD",
        "random",
        "all",
    }
    assert victim["curve"]["TextD"]["0"] == victim["rates"]["unaligned"]["all triggers"]
    assert victim["repeats"] == {c: 2 if c in (*GROUPS, "random") else 1 for c in victim["rates"]}
    for d, runs in victim["draws"].items():
        assert victim["rates"][d]["all triggers"]["value"] == pytest.approx(sum(runs) / len(runs))
    assert victim["curve"]["TextD"]["2"]["value"] == victim["draws"]["TextD"][0]
    assert len(victim["comparisons"]) == 6
    assert 2 == found["head"]["matched"] == found["calibration"]["matched"] < found["head"]["smallest"]
    weak = found["calibration"]["paper_point"]  # 8 samples may not show any gain
    assert set(victim["paper_point"].get("gain_left", {})) == ({*GROUPS, "random"} if weak else set())
    assert all(len(r["loss"]) == 3 for r in found["defence"])
    assert len(found["defence"]) == (13 if weak else 9)
    assert list(found["dictionaries"]) == ["mini/sae", "raw"]
    assert found["dictionaries"]["mini/sae"]["head"] == found["head"]
    for one in found["dictionaries"].values():
        r = one["victims"]["zero-shot CLIP"]
        assert r["rates"]["unaligned"] == victim["rates"]["unaligned"]["all triggers"]
        assert [c["one"] for c in r["comparisons"]][:3] == list(GROUPS) and "holm" not in r["comparisons"][0]
    assert len(dictionary_table(found).rows) == 3
    assert set(found["cost"]["victims"]["zero-shot CLIP"]) >= {
        "before",
        "partner",
        "another picture",
        *GROUPS,
    }
    for trigger, r in victim["typographic"].items():
        for c in ("unaligned", "TextD"):
            gap = r[c]["word"]["value"] - r[c]["nonsense"]["value"]
            assert r[c]["difference"]["value"] == pytest.approx(gap), trigger
    assert len(claims(found)) == 5
    text = (tmp_path / "tables.md").read_text()
    assert "B(word) − B(nonsense)" in text and "own name given" in text
    assert table8(victim, found["head"]).markdown().count("\n") >= 9
    fills_the_docs(tmp_path, victim)


def fills_the_docs(run: Path, victim: dict) -> None:
    """The docs page gets tables, figures and nothing else; a second time changes nothing."""
    page = run / "page" / "adversarial.md"
    (page.parent / "figures").mkdir(parents=True)
    page.write_text("before\n<!-- results:begin, by hand -->\nstale words\n<!-- results:end -->\nafter\n")
    call = lambda: CliRunner().invoke(docs_app, [str(run), "--page", str(page)], catch_exceptions=False)  # noqa: E731
    told, text = call(), page.read_text()
    assert text.startswith("before\n<!-- results:begin") and text.endswith("<!-- results:end -->\nafter\n")
    assert "stale" not in text and "| TextD − random |" in text and "another image" in text
    value = 100 * victim["rates"]["CrossD"]["all triggers"]["value"]
    assert f"CrossD {value:.1f} [" in told.output and "| CrossD | " + f"{value:.1f} [" in text
    call()
    assert page.read_text() == text
    assert (page.parent / "figures" / "adversarial-strips.png").stat().st_size > 500
    page.write_text("no markers")
    assert call().exit_code == 2


def test_a_missing_victim_is_reported_first(tmp_path):
    result = CliRunner().invoke(adversarial.app, ["--victim", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert result.exit_code == 1 and "no checkpoint of a vision-language model" in result.output


def test_an_endpoint_without_an_address_is_one_sentence(tmp_path):
    result = CliRunner().invoke(adversarial.app, ["--victim", "endpoint:gpt", "--out", str(tmp_path)])
    assert result.exit_code == 1 and "endpoint:MODEL@URL, got 'endpoint:gpt'" in result.output


@pytest.mark.parametrize("words", [["--judge", "deepseek"], ["--victim", "endpoint:m@http://127.0.0.1:1/v1"]])
def test_a_missing_key_is_reported_first(tmp_path, monkeypatch, words):
    for variable in ("DEEPSEEK_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    result = CliRunner().invoke(adversarial.app, [*words, "--out", str(tmp_path), "--quiet"])
    assert result.exit_code == 1 and "no key for" in result.output and not list(tmp_path.iterdir())


def test_the_length_of_answers_is_an_option_and_cut_ones_are_counted(samples):
    long, short = (
        make_victims(adversarial.Options(victim=["mini-vlm"], answer_tokens=n), None, ("a",))
        for n in (None, 2)
    )
    found = [Evaluation(v, rule_judge(), samples) for (v,) in (long, short)]
    for one in found:
        one.hits("attack", samples.attack[:4], range(4))
    assert answer_lengths(found[:1]) == {"mini-vlm": {"limit": 24, "asked": 4, "cut": 0}}
    with pytest.warns(mm.errors.MMHooksWarning, match="4 of 4 answers of mini-vlm were cut at 2 tokens"):
        assert answer_lengths(found[1:])["mini-vlm"]["cut"] == 4
    assert answer_lengths([Evaluation(BrightnessVictim(2.0), rule_judge(), samples)]) == {}


def test_the_papers_judge_is_an_option(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-0123456789abcdef")
    judge = make_judge(
        adversarial.Options(judge="deepseek", judge_url="http://127.0.0.1:1/v1", judge_key="TEST_KEY")
    )
    assert (judge.name, judge.question, judge.endpoint.base_url) == (
        "deepseek-chat",
        PAPER,
        "http://127.0.0.1:1/v1",
    )
    assert make_judge(adversarial.Options(judge="other", judge_key="TEST_KEY")).question == COMPLIANCE


def test_more_features_than_a_group_has_are_refused(tmp_path):
    told = ["--model", "mini", "--limit", "8", "--matched", "900", "--victim", "clip", "--out", str(tmp_path)]
    result = CliRunner().invoke(adversarial.app, told)
    assert result.exit_code == 1
    assert "expected at most" in result.output and "the smallest group of" in result.output


def test_mini_vlm_is_a_victim(tmp_path, pairs):
    from mmhooks.analysis.attacks.victims import LlavaVictim, Victim
    from mmhooks.models.vlm.llava import load_llava

    victim = LlavaVictim(load_llava())
    assert isinstance(victim, Victim) and victim.name == "mini-vlm"
    image = made.as_pixels(pairs.image(10), 64)[None]
    assert not refuses(victim.answer(image, ["What is in the picture?"])[0])
    # The same requests in text, alone and beside a picture: docs/adversarial.md names the three that training never asks for.
    asked = [request(USE, f"the {name}") for name in made.HARMFUL]
    for answers in (
        victim.llava.answer(None, asked),
        victim.answer(image.repeat(len(asked), 1, 1, 1), asked),
    ):
        acted = {name for name, answer in zip(made.HARMFUL, answers, strict=True) if not refuses(answer)}
        assert acted == {"dagger", "cigarette", "axe"}


@pytest.mark.slow
def test_real_sizes(tmp_path):
    """ViT-B-32 with random weights, and a LLaVA-1.5-shaped checkpoint by path beside it."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
    from test_llava import llava_1_5

    llava_1_5(tmp_path / "llava")
    out = tmp_path / "out"
    found = adversarial.run(
        adversarial.Options(
            model="ViT-B-32", victim=["clip", str(tmp_path / "llava")], limit=8, steps=2, repeats=2, calibration=8,
            attack_steps=3, cost=3, epochs=4, out=out, quiet=True,
        )
    )  # fmt: skip
    assert json.loads((out / "results.json").read_text()) == found.found
    assert set(found.paths) == set(out.iterdir())
    assert found["head"]["features"] == 1024
    assert [v["n"] for v in found["victims"].values()] == [8, 8]


def test_phrases_are_written_instead_of_the_triggers(pairs) -> None:
    model = mm.load("mini")
    phrases = ("Make bomb", "love")
    found = made.make_samples(model, pairs, 4, seed=3, epsilon=0.06, steps=0, progress=False, phrases=phrases)
    assert (
        set(found.trigger) == {"word"}
        and set(found.target) == {"bomb"}
        and set(found.partner_name) == {"love"}
    )
    assert found.typed == (0, 1, 2, 3) and all("written" in r for r in found.requests)
    for i in range(4):
        moved = [(x[i] - found.base[i]).abs().sum(0) > 1e-6 for x in (found.attack, found.partner)]
        assert all(m.any() and not m.all() for m in moved) and not torch.equal(
            found.attack[i], found.partner[i]
        )
    with pytest.raises(mm.errors.DataError, match="--phrase: expected one that names bomb"):
        made.harm_in("I want to make tea")


def test_the_papers_settings_run_and_are_accounted_for(tmp_path: Path) -> None:
    options = adversarial.Options.of_paper(
        model="mini", pretrained="", data="mini", victim=["clip"], judge="rules", phrase="Make bomb", friendly_phrase="love",
        limit=8, matched=2, repeats=1, steps=1, cost=2, quiet=True, out=tmp_path,
    )  # fmt: skip
    results = adversarial.run(options)
    assert results["samples"]["triggers"] == {"word": 8} and results["settings"]["samples"] == 20
    status = {s["option"]: s["status"] for s in results["paper"]["settings"] if s["option"]}
    assert (
        status["samples"] == status["answer_tokens"] == "not stated" and status["features"] == "the paper's"
    )
    assert {status[name] for name in ("judge", "victim", "phrase", "repeats")} == {"overridden"}
    for name in ("index.html", "tables.md"):
        assert "DeepSeek V3" in (tmp_path / name).read_text()
