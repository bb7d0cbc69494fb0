"""Names: one owner each, the user's own file by its spelling, and a changed file noticed."""

import hashlib
import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

import gambeson as gb
from gambeson.attacks.registry import ATTACKS
from gambeson.base import Registry, UserError, user_code
from gambeson.cli.app import run
from gambeson.defenses.registry import DEFENSES
from gambeson.evaluation import AttackRun
from gambeson.evaluation.transfer import TransferRun
from gambeson.training import Recipe, TrainRun

MINE = """
import gambeson as gb
from helper import WEIGHT

class Quiet(gb.defenses.Defense):
    "Cross-entropy, and a penalty on large logits."
    weight: float = WEIGHT

    def terms(self):
        return {"clean": (1.0, gb.defenses.Clean()), "size": (self.weight, lambda m, b: m(b.images).square().mean())}

class Half(gb.attacks.FGSM):
    "FGSM with half of eps."
    def __call__(self, model, x, y, **more):
        return gb.attacks.FGSM(eps=self.eps / 2)(model, x, y, **more)

class Neither:
    pass

NUMBER = 3
"""


class AtTop(gb.defenses.Defense):
    def terms(self):
        return {"clean": (1.0, gb.defenses.Clean())}


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "helper.py").write_text("WEIGHT = 0.25\n")
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def test_a_defence_of_a_file_goes_through_yaml_and_back(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    run_ = TrainRun(data="digits", model="lenet5", defense={"name": "mine.py:Quiet"}, recipe=Recipe(epochs=1))
    stored = yaml.safe_load(yaml.safe_dump(run_.plain()))
    assert stored["defense"] == {"name": f"{mine}:Quiet#sha256={digest(mine)}", "weight": 0.25}
    monkeypatch.chdir("/")
    again = TrainRun(**stored)
    assert again == run_
    assert type(again.defense) is type(run_.defense)
    inner = TypeAdapter(gb.defenses.AnyDefense).validate_python(
        {"name": "ensemble", "members": 2, "inner": {"name": f"{mine}:Quiet", "weight": 1}}
    )
    assert inner.plain()["inner"] == {**stored["defense"], "weight": 1.0}


def test_a_changed_file_is_noticed_and_can_be_taken_on_purpose(mine):
    stored = TrainRun(data="digits", model="lenet5", defense=f"{mine}:Quiet").plain()
    attack = AttackRun(model="x", attack=f"{mine}:Half").plain()
    transfer = TransferRun(models=("x", "y"), attacks=(f"{mine}:Half",), eps=0.1).plain()
    assert attack["attack"] == transfer["attacks"][0] == f"{mine}:Half#sha256={digest(mine)}"
    assert AttackRun(**attack).plain() == attack
    old = digest(mine)
    mine.write_text(MINE.replace("= WEIGHT", "= 2 * WEIGHT"))
    words = rf"mine.py was changed since \w+ was stored \(its sha256 begins with {digest(mine)}, not {old}\): restore"
    for build in (lambda: TrainRun(**stored), lambda: AttackRun(**attack), lambda: TransferRun(**transfer)):
        with pytest.raises(UserError, match=words):
            build()
    assert gb.defenses.create(f"{mine}:Quiet").weight == 0.5
    mine.write_text(MINE)
    assert TrainRun(**stored).plain() == stored


def test_naming_the_stored_defence_again_keeps_its_settings(mine, tmp_path):
    from gambeson.base import read_settings
    from gambeson.cli.options import put

    def named(name):
        settings = read_settings(tmp_path / "run.yaml", "train")
        put(settings, "defense.name", name)
        return settings["defense"]

    stored = TrainRun(data="digits", model="lenet5", defense={"name": f"{mine}:Quiet", "weight": 0.5}).plain()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(stored))
    mine.write_text(MINE + "# changed")
    assert named(None) == stored["defense"]
    assert named(f"{mine}:Quiet") == {"name": f"{mine}:Quiet", "weight": 0.5}
    assert named("standard") == {"name": "standard"}


def test_what_an_object_was_made_from_is_stored_even_when_the_file_changes_meanwhile(mine):
    defense = gb.defenses.create(f"{mine}:Quiet")
    name = f"{mine}:Quiet#sha256={digest(mine)}"
    mine.write_text(MINE + "\n# later\n")
    assert gb.defenses.name_of(defense) == name


def test_a_class_of_python_is_found_again_by_its_file(tmp_path):
    stored = TrainRun(data="digits", model="lenet5", defense=AtTop()).plain()
    assert stored["defense"]["name"] == f"{__file__}:AtTop#sha256={digest(Path(__file__))}"

    class Inside(AtTop):
        pass

    assert gb.defenses.name_of(Inside()) == "Inside"  # nothing finds it again, and nothing pretends to


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.py:Quiet", r"none.py does not exist: it should define Quiet"),
        ("mine.py:Quite", r"mine.py has no class 'Quite': it defines Quiet, Half, Neither; write mine.py:CLASS"),
        ("mine.py:Neither", r"Neither of .*mine.py is no defence: expected a subclass of gambeson.defenses.Defense"),
        ("mine.py:NUMBER", r"NUMBER of .*mine.py is no defence"),
        ("mine.py:Half", r"Half of .*mine.py is no defence"),
        ("bad.py:Quiet", r"running .*bad.py failed in line 2 of .*bad.py \(ZeroDivisionError: .*\): fix it there"),
        ("torn.py:Quiet", r"running .*torn.py failed in line 1 of .*torn.py \(SyntaxError"),
        ("mine.py:Quiet#sha256=00", r"mine.py was changed since Quiet was stored"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_and_code_2(mine, monkeypatch, capsys, name, words):
    (mine.parent / "bad.py").write_text("x = 1\ny = x / 0\n")
    (mine.parent / "torn.py").write_text("def (:\n")
    monkeypatch.chdir(mine.parent)
    with pytest.raises(UserError, match=words) as told:
        gb.defenses.create(name)
    assert "\n" not in str(told.value)
    assert run(["train", "--data", "digits", "--model", "lenet5", "--defense", name, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error)
    assert "Traceback" not in error
    assert not (mine.parent / "out").exists()


def test_settings_of_a_users_class_are_checked_as_ours_are(mine):
    with pytest.raises(UserError, match="Quiet has no setting 'wieght': did you mean weight"):
        gb.defenses.create(f"{mine}:Quiet", wieght=1)
    with pytest.raises(UserError, match="Half needs eps"):
        gb.attacks.create(f"{mine}:Half")
    with pytest.raises(UserError, match="Quiet of .* is no attack: expected __call__"):
        gb.attacks.create(f"{mine}:Quiet")


def test_attack_takes_a_file_on_the_command_line(mine, trained, digits, tmp_path, capsys):
    gb.models.save(trained, tmp_path / "m.safetensors")
    (mine.parent / "mine.py").write_text(MINE)
    common = ["--model", str(tmp_path / "m.safetensors"), "--data", "digits", "--eps", "0.2"]
    flags = ["attack", *common, "--attack", f"{mine}:Half", "--images", "60"]
    assert run([*flags, "--out", str(tmp_path / "a"), "--json"]) == 0
    capsys.readouterr()
    stored = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert stored["attack"] == f"{mine}:Half#sha256={digest(mine)}"
    assert run(["attack", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "b"), "--json"]) == 0
    assert f'"largest": {0.1:.3g}' in capsys.readouterr().out  # half of eps, so it was this one that ran
    assert (tmp_path / "a" / "result.json").read_bytes() == (tmp_path / "b" / "result.json").read_bytes()
    mine.write_text(MINE + "#")
    assert run(["attack", "--config", str(tmp_path / "a" / "run.yaml"), "--out", str(tmp_path / "c")]) == 2
    assert "was changed since Half was stored" in capsys.readouterr().err
    assert run([*flags, "--out", str(tmp_path / "a")]) == 2
    assert "holds another run (it differs in attack)" in capsys.readouterr().err


def test_a_name_has_one_owner():
    with pytest.raises(
        UserError, match=r"'pgd' of .*\.Other is registered already, by gambeson\.attacks\.gradient\.pgd\.PGD"
    ):

        @gb.attacks.register("pgd")
        class Other(gb.attacks.PGD):
            pass

    assert ATTACKS.get("pgd").target is gb.attacks.PGD
    with pytest.raises(UserError, match=r"test_registry\..*\.Nothing is no defence: expected a subclass"):

        @gb.defenses.register("nothing")
        class Nothing:
            pass

    assert "nothing" not in gb.defenses.names()


def test_registering_again_replaces_the_same_class_alone():
    things = Registry("thing", "gambeson.things", room="gambeson.base", check=lambda target: None)

    def cell(number):
        @things.register("mine", size=number)
        class Mine:
            """One.

            Two.
            """

        return Mine

    cell(1)
    second = cell(2)  # as when a notebook's cell is run again
    assert things.get("mine").target is second
    assert things.get("mine").options == {"size": 2}
    assert things.get("mine").summary == "One."
    assert things.names() == ["mine"]
    with pytest.raises(UserError, match="unknown thing 'mime': did you mean mine"):
        things.get("mime")
    for name in ("", " x", "a.py:B"):
        with pytest.raises(UserError, match="cannot be the name of a thing"):
            things.register(name)(second)


def test_names_are_in_alphabetical_order_and_every_one_can_be_built():
    for kind in ("image", "universal"):
        names = gb.attacks.names(kind)
        assert names == sorted(names)
        for name in names:
            settings = {"eps": 0.1} if "eps" in ATTACKS.get(name).settings else {}
            assert getattr(gb.attacks.create(name, **settings), "eps", 0.1) == 0.1
    assert len(gb.attacks.names("image")) >= 26
    assert len(gb.attacks.names("universal")) >= 8
    assert gb.defenses.names() == sorted(gb.defenses.names())
    for name in gb.defenses.names():
        settings = {"eps": 0.1} if gb.defenses.entry(name).needs("eps") else {}
        assert gb.defenses.name_of(gb.defenses.create(name, **settings)) == name


def test_every_setting_of_a_listing_says_what_it_is():
    for registry in (ATTACKS, DEFENSES):
        for entry in registry.own():
            assert entry.summary
            assert "\n" not in entry.summary
            for name, setting in entry.settings.items():
                assert setting.type, name
                assert setting.required == (setting.default is None and entry.target.model_fields[name].is_required())
    assert gb.attacks.create("mi-fgsm", eps=0.1) == gb.attacks.IFGSM(eps=0.1, momentum=1.0)
    assert gb.attacks.create("mi-fgsm", eps=0.1, momentum=0.5).momentum == 0.5
    transfer = ATTACKS.get("mi-fgsm")
    assert transfer.settings["momentum"].default == 1.0
    assert ATTACKS.get("i-fgsm").settings["momentum"].default == 0.0


def test_short_names():
    assert user_code.short("pgd") == "pgd"
    assert user_code.short("/a b/c.py:D#sha256=0123456789abcdef") == "D"


@pytest.mark.parametrize("name", [None, 3, ["pgd"]])
def test_what_is_no_text_is_no_name(name):
    for take in (gb.attacks.create, gb.defenses.create, gb.evaluation.load_model, gb.zoo.load, gb.models.load):
        with pytest.raises(UserError, match="is no name or path: give text"):
            take(name)


def test_a_path_is_a_name(trained, digits, tmp_path):
    gb.models.save(trained, tmp_path / "net.safetensors")
    assert gb.evaluation.load_model(tmp_path / "net.safetensors", dataset=digits).model.card == trained.card
