"""Tables of settings into dataclasses: what is said comes out, and every wrong word is one sentence with its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest

from vlm_core.settings import checked, declared, read_settings


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        checked(self)


@dataclass(frozen=True)
class Shape:
    KINDS: ClassVar[dict] = {}
    name: str = "none"

    def __post_init__(self) -> None:
        checked(self)


@dataclass(frozen=True)
class Round(Shape):
    radius: float = 1.0


Shape.KINDS["round"] = Round


@dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...] = ()
    named: Mapping[str, Inner] = field(default_factory=dict)
    shapes: tuple[Shape, ...] = ()
    words: tuple[str, ...] = ()
    on: bool = False
    way: Literal["up", "down"] = "up"
    free: Mapping[str, Any] = field(default_factory=dict)
    maybe: int | None = None

    def __post_init__(self) -> None:
        checked(self)


def outer(**content):
    return declared(Outer, {"inner": {"size": 3}, **content})


def test_what_is_said_comes_out():
    made = outer(
        many=[{"size": 1, "rate": 2}], named={"a": {"size": 4}}, shapes=[{"kind": "round", "radius": 2.5, "name": "o"}],
        words=["x", "y"], on=True, way="down", free={"anything": [1, {"b": None}]}, maybe=7,
    )  # fmt: skip
    assert made == Outer(
        Inner(3), (Inner(1, 2.0),), {"a": Inner(4)}, (Round("o", 2.5),), ("x", "y"), True, "down", {"anything": [1, {"b": None}]}, 7
    )
    assert isinstance(made.many[0].rate, float) and outer(maybe=None).maybe is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"innner": 1}, "there is no setting 'innner': it takes inner, many, named, shapes, words, on, way, free, maybe"),
        ({"inner": {}}, "inner: it lacks the setting 'size': it takes size, rate"),
        ({"inner": 3}, "inner: it must be a table with size, rate, got 3 \\(int\\)"),
        ({"inner": {"size": "3"}}, "inner: size must be an integer, got '3' \\(str\\)"),
        ({"inner": {"size": True}}, "inner: size must be an integer, got True \\(bool\\)"),
        ({"inner": {"size": 3, "rate": "1e-3"}}, "inner: rate must be a number, got the text '1e-3': write 0.001 \\(YAML takes"),
        ({"inner": {"size": 3, "rate": "fast"}}, "inner: rate must be a number, got 'fast' \\(str\\)"),
        ({"inner": {"size": 3, "rate": float("nan")}}, "inner: rate must be finite"),
        ({"many": {"size": 3}}, "many must be a list, got {'size': 3} \\(dict\\)"),
        ({"many": [{"size": 3}, {"sizes": 3}]}, "many\\[1\\]: there is no setting 'sizes': it takes size, rate"),
        ({"named": [1]}, "named must be a table with names, got \\[1\\] \\(list\\)"),
        ({"named": {"a": {"size": 1.5}}}, "named.a: size must be an integer, got 1.5"),
        ({"shapes": [{}]}, "shapes\\[0\\]: it lacks the setting 'kind': choose from round"),
        ({"shapes": [{"kind": "square"}]}, "shapes\\[0\\]: there is no kind 'square': choose from round"),
        ({"shapes": [{"kind": "round", "side": 2}]}, "shapes\\[0\\]: there is no setting 'side': it takes kind, name, radius"),
        ({"words": "x"}, "words must be a list, got 'x' \\(str\\)"),
        ({"words": ["x", 1]}, "words\\[1\\] must be a text, got 1 \\(int\\)"),
        ({"words": [" "]}, "words\\[0\\] is empty"),
        ({"on": "yes"}, "on must be True or False, got 'yes'"),
        ({"way": "left"}, "way must be one of up, down, got 'left'"),
        ({"maybe": "x"}, "maybe must be an integer, got 'x'"),
        ({"on": None}, "on must be True or False, got None"),
    ],
)
def test_every_wrong_word_is_one_sentence_with_its_place(content, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        outer(**content)
    assert "\n" not in str(caught.value)


def test_no_table_at_all():
    with pytest.raises(ValueError, match="it must be a table with inner, .*, got 5 \\(int\\)"):
        declared(Outer, 5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "a.json is neither .toml nor .yaml: a plan is one of them"),
        ("a.toml", "x = [", "a.toml is no TOML \\(.*\\): mend it there"),
        ("a.yaml", "x: [", "a.yaml is no YAML \\(.*\\): mend it there"),
        ("a.yaml", "- 1", "a.yaml holds no table of settings: it needs at least x"),
        ("a.toml", None, "there is no configuration at .*a.toml"),
    ],
)
def test_a_file_that_is_none(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path / name, "a plan", "x")
    with pytest.raises(ValueError, match="a plan is read from a file's path, got 3"):
        read_settings(3, "a plan", "x")


def test_toml_and_yaml_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text('x = 1\n[y]\nz = ["a", 2.5]\n')
    (tmp_path / "a.yml").write_text("x: 1\ny:\n  z: [a, 2.5]\n")
    found = [read_settings(tmp_path / name, "a plan", "x") for name in ("a.toml", "a.yml")]
    assert found[0] == found[1] == {"x": 1, "y": {"z": ["a", 2.5]}}
