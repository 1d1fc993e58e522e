"""Stop strings in a text that arrives in parts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_t5gemma.text.stop_strings import StopStrings, checked_stops, first_stop

STOPS = ["##", "Question:"]


def test_parts_are_held_back_while_they_may_begin_a_stop_string():
    stops = StopStrings(STOPS)
    assert [stops.add(part) for part in ("blue. ", "Que", "en #", "#More")] == ["blue. ", "", "Queen ", ""]
    assert stops.found
    assert stops.add("more") + stops.finish() == ""


def test_rest_is_returned_when_no_more_comes():
    stops = StopStrings(STOPS)
    assert stops.add("a Quest") + "|" + stops.finish() == "a |Quest"
    assert not stops.found


def test_stop_string_that_begins_first_wins_though_another_ends_first():
    stops = StopStrings(["abcd", "c"])
    assert [stops.add(part) for part in ("xab", "c", "d")] == ["x", "", ""]
    stops = StopStrings(["abcd", "c"])
    assert [stops.add(part) for part in ("xabc", "e")] == ["x", "ab"]
    assert stops.found


@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(st.text("ab€", max_size=5), max_size=12),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=4),
)
def test_any_parts_join_to_the_text_before_the_first_stop_string(parts, stops):
    whole = "".join(parts)
    cuts = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(cuts)] if cuts else whole
    matcher, got = StopStrings(stops), ""
    for part in parts:
        got += matcher.add(part)
        assert expected.startswith(got)
        assert not matcher.found or got == expected
    assert got + matcher.finish() == expected
    assert matcher.found == bool(cuts)
    assert whole[: first_stop(whole, stops)] == expected


def test_stops_are_a_string_or_a_list_of_them():
    assert checked_stops(None) == checked_stops([]) == ()
    assert checked_stops("a") == ("a",)
    assert checked_stops(("a", "b", "a")) == ("a", "b")
    with pytest.raises(ValueError, match=r"at most 64\. Received: 65 of them"):
        checked_stops(["a"] * 65)
