import pickle
from pathlib import Path

import pytest

from data_pipeline.errors import UsageError
from data_pipeline.overrides import DENY_LIST, Overrides


@pytest.fixture(scope="module")
def names(nouns):
    return {name: row for row, name in enumerate(nouns.synsets["synset"].to_pylist())}


@pytest.fixture(scope="module")
def shipped(nouns):
    return {deny: Overrides.load(None, deny, nouns) for deny in ("none", "non-visual", "sensitive", "all")}


@pytest.fixture
def load(nouns, shipped, tmp_path):
    def call(text: str | None = None, deny: str = "none") -> Overrides:
        if text is None and deny in shipped:
            return shipped[deny]
        path = None
        if text is not None:
            path = tmp_path / "overrides.yaml"
            path.write_text(text, "utf-8")
        return Overrides.load(path, deny, nouns)

    return call


@pytest.fixture
def apply(nouns):
    def call(overrides: Overrides, tag: str, **options: bool) -> tuple[list[str], str | None]:
        senses, reason = overrides.apply(tag, nouns.senses(tag), **options)
        return [nouns.synset(sense).name for sense in senses], reason

    return call


def ancestors(names, nouns, synset: str) -> set[str]:
    """Everything above, in the slow and obvious way."""
    hypernyms = nouns.synsets["hypernyms"]
    found: set[int] = set()
    waiting = [names[synset]]
    while waiting:
        row = waiting.pop()
        if row not in found:
            found.add(row)
            waiting.extend(hypernyms[row].as_py())
    return {nouns.synset(row).name for row in found}


def test_nothing_asked_changes_nothing(load, nouns):
    for tag in ("dog", "crane", "giveaway"):
        assert load().apply(tag, nouns.senses(tag)) == (tuple(nouns.senses(tag)), None)


def test_force_names_the_synset_however_the_tag_is_written(load, apply):
    overrides = load("force: {Hot_Dog: frank.n.02, '#ＪＡＧＵＡＲ': car.n.01, no: norway.n.01, '2pac': rapper.n.01}")
    for tag in ("hotdog", "hot_dog"):
        assert apply(overrides, tag) == (["frank.n.02"], None)
    assert apply(overrides, "jaguar") == (["car.n.01"], None)
    assert apply(overrides, "no") == (["norway.n.01"], None)  # not the truth value that YAML makes of it
    assert apply(overrides, "2pac") == (["rapper.n.01"], None)


def test_forbid_takes_a_tag_a_synset_or_a_whole_branch(load, apply, names, nouns):
    overrides = load("forbid:\n- dog\n- wolf.n.01\n- {branch: feline.n.01}\n")
    assert apply(overrides, "dog") == ([], "forbidden")
    assert apply(overrides, "puppy")[0][0] == "puppy.n.01"
    assert "wolf.n.01" not in apply(overrides, "wolf")[0]
    assert apply(overrides, "ocelot") == ([], "forbidden")
    below = {name for name, row in names.items() if overrides.removed.get(row)}
    for name in ("tiger.n.02", "siamese_cat.n.01", "dog.n.01", "animal.n.01", "wolf.n.01"):
        assert (name in below) == ("feline.n.01" in ancestors(names, nouns, name) or name == "wolf.n.01"), name


def test_merge_makes_one_class_of_two_through_any_number_of_steps(load, apply):
    overrides = load("merge: {puppy.n.01: dog.n.01, poodle.n.01: puppy.n.01}\nforce: {doggo: poodle.n.01}")
    assert apply(overrides, "puppy")[0][0] == apply(overrides, "poodle")[0][0] == "dog.n.01"
    assert apply(overrides, "doggo") == (["dog.n.01"], None)


def test_senses_that_merge_are_one_candidate(load, nouns, names):
    senses = [names["crane.n.04"], names["crane.n.05"]]
    overrides = load("merge: {crane.n.04: crane.n.05}")
    assert overrides.apply("crane", senses) == ((names["crane.n.05"],), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("force:\n  jaguar: jagaur.n.01\n", "line 2: 'jagaur.n.01' is no synset of WordNet; did you mean jaguar.n.01?"),
        ("forbid:\n- dog\n- dog.n.99\n", "line 3: 'dog.n.99' is no synset of WordNet; did you mean dog.n.0"),
        ("merge: {xyzzy.n.01: dog.n.01}", "line 1: 'xyzzy.n.01' is no synset of WordNet"),
        ("forbid: ['###']", "line 1: '###' cannot be a hashtag"),
        ("forbid: [hot dog!]", "did you mean hot_dog?"),
        ("forbid: [{brunch: dog.n.01}]", "write a tag, a synset, or {branch: SYNSET}"),
        ("forbid: dog", "forbid is a list"),
        ("froce: {a: b}", "did you mean force?"),
        ("force: {dog: cat.n.01}\nforce: {dog: dog.n.01}", "line 2: 'force' is there twice"),
        ("force: {dog: [cat.n.01]}", "a single name is expected"),
        ("merge: {cat.n.01: dog.n.01, dog.n.01: cat.n.01}", "go in a ring"),
        ("merge: {cat.n.01: dog.n.01}\nforbid: [dog.n.01]", "line 1: dog.n.01 is no class (forbidden)"),
        ("force: {fido: dog.n.01}\nforbid: [{branch: animal.n.01}]", "line 1: 'fido' is forced to dog.n.01 and forb"),
        ("[1, 2", "this is not YAML"),
        ("- dog", "`name: value` is expected"),
        ("", "is empty"),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_line(load, text, message):
    with pytest.raises(UsageError) as error:
        load(text)
    assert message in str(error.value)
    assert "overrides.yaml" in str(error.value)


def test_a_file_of_tags_that_would_run_code_is_only_text(load, tmp_path):
    with pytest.raises(UsageError):
        load(f"!!python/object/apply:os.system ['touch {tmp_path}/ran']")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ("december", "denied_non_visual"), ("mathematics", "denied_non_visual"), ("thousand", "denied_non_visual"),
        ("no", "denied_non_visual"), ("irony", "denied_non_visual"), ("lesbian", "denied_sensitive"),
        ("muslim", "denied_sensitive"), ("communist", "denied_sensitive"), ("leper", "denied_sensitive"),
        ("idiot", "denied_sensitive"), ("rembrandt", "denied_sensitive"), ("ghanian", "denied_sensitive"),
    ],
)  # fmt: skip
def test_the_shipped_list_drops_what_no_picture_shows_and_what_none_should_tell(load, apply, tag, reason):
    assert apply(load(deny="all"), tag) == ([], reason)


@pytest.mark.parametrize(
    ("tag", "synset"),
    [
        ("dog", "dog.n.01"), ("wedding", "wedding.n.01"), ("christmas", "christmas.n.01"), ("sunset", "sunset.n.01"),
        ("winter", "winter.n.01"), ("dragon", "dragon.n.01"), ("angel", "angel.n.01"), ("rainbow", "rainbow.n.01"),
        ("red", "red.n.01"), ("circle", "circle.n.01"), ("surfing", "surfing.n.01"), ("doctor", "doctor.n.01"),
        ("bride", "bride.n.01"), ("nun", "nun.n.01"), ("coin", "coin.n.01"), ("smile", "smile.n.01"),
        ("whale", "whale.n.02"), ("shrimp", "prawn.n.01"), ("people", "people.n.01"),
    ],
)  # fmt: skip
def test_the_shipped_list_leaves_nouns_that_can_be_seen(load, apply, tag, synset):
    assert apply(load(deny="all"), tag)[0][0] == synset


def test_non_visual_needs_every_way_up_and_sensitive_only_one(load, names):
    """new_moon.n.01 is a time and an appearance; a hooker (prostitute) is a woman and a wrongdoer."""
    removed = load(deny="all").removed
    assert names["new_moon.n.01"] not in removed
    assert removed[names["streetwalker.n.01"]] == "denied_sensitive"
    assert names["woman.n.01"] not in removed


def test_animals_plants_food_places_and_things_stay(load, names, nouns):
    removed = load(deny="all").removed
    below: dict[str, set[int]] = {"animal.n.01": set(), "plant.n.02": set(), "food.n.02": set(), "location.n.01": set()}
    below |= {"artifact.n.01": set(), "geological_formation.n.01": set(), "phenomenon.n.01": set()}
    parents = nouns.synsets["hypernyms"].to_pylist()
    for branch, found in below.items():
        found.add(names[branch])
        size = 0
        while size < len(found):
            size = len(found)
            found |= {row for row, above in enumerate(parents) if found & set(above)}
    denied = {nouns.synset(row).name for found in below.values() for row in found if row in removed}
    assert sum(map(len, below.values())) > 20_000
    assert denied == {"massage_parlor.n.01", "whorehouse.n.01", "bitch.n.04"}


def test_one_part_of_the_list_can_be_in_force(load):
    both, first, second = (load(deny=deny).removed for deny in ("all", "non-visual", "sensitive"))
    assert both.keys() == first.keys() | second.keys()
    assert set(first.values()) == {"denied_non_visual"} and set(second.values()) == {"denied_sensitive"}
    assert load(deny="none").removed == {}


def test_a_tag_whose_usual_sense_is_non_visual_goes_whole_unless_the_context_decides(load, apply, names):
    overrides = load(deny="all")
    assert apply(overrides, "bass") == ([], "denied_non_visual")
    competing, reason = apply(overrides, "bass", competing=True)
    assert reason is None
    assert {"bass.n.01", "sea_bass.n.01"} <= set(competing)
    assert names["bass.n.01"] in overrides.removed  # what the caller drops the tag by, should it win
    assert apply(overrides, "december", competing=True) == ([], "denied_non_visual")


def test_a_forced_tag_is_stronger_than_the_deny_list(load, apply):
    assert apply(load("force: {no: signal.n.01}", deny="all"), "no") == (["signal.n.01"], None)


def test_a_list_of_ones_own(load, apply, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sensitive:\n- {branch: dog.n.01, why: x, keep: [poodle.n.01]}\n- {synset: cat.n.01, why: x}\n")
    overrides = load(deny=str(path))
    assert apply(overrides, "corgi") == ([], "denied_sensitive")
    assert apply(overrides, "poodle") == (["poodle.n.01"], None)
    assert apply(overrides, "siamesecat") == (["siamese_cat.n.01"], None)
    path.write_text("sensitive:\n- branch: dog.n.01\n")
    with pytest.raises(UsageError, match="line 2: an entry has one of"):
        load(deny=str(path))
    with pytest.raises(UsageError, match="neither none, non-visual, sensitive, all nor a file"):
        load(deny="everything")


def test_every_entry_of_the_shipped_list_gives_its_reason(load):
    text = DENY_LIST.read_text("utf-8")
    entries = sum(text.count(f"- {kind}:") for kind in ("branch", "below", "synset", "names"))
    assert text.count("\n    why: ") == entries > 20


def test_the_identity_follows_what_is_decided_not_how_it_is_written(load):
    one = load("force: {dog: cat.n.01}\nforbid: [wolf.n.01, fox]")
    assert load("# a note\nforbid:\n- fox\n- wolf.n.01\nforce:\n  '#Dog': cat.n.01\n").sha256 == one.sha256
    assert load("force: {dog: cat.n.01}\nforbid: [wolf.n.01]").sha256 != one.sha256
    assert load(deny="all").sha256 != load(deny="sensitive").sha256


def test_it_travels_to_other_processes(load, tmp_path: Path):
    overrides = load("force: {dog: cat.n.01}\nforbid: [fox]\nmerge: {wolf.n.01: dog.n.01}", deny="sensitive")
    assert pickle.loads(pickle.dumps(overrides)) == overrides  # noqa: S301
    overrides.save(tmp_path / "o.json")
    assert Overrides.open(tmp_path / "o.json") == overrides
