"""The order in which prompts are read."""

from keras_t5gemma.reinforcement.prompts import Prompts

TEXTS = ["a", "b", "c", "d", "e"]


def read(seed, steps):
    prompts = Prompts(TEXTS, 2, seed)
    return [row["prompt"] for step in range(1, steps + 1) for row in prompts.batch(step)]


def test_each_round_reads_each_prompt_once_in_an_order_of_its_own():
    order = read(0, 10)
    rounds = [order[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(texts) == TEXTS for texts in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert read(1, 10) != order


def test_step_reads_the_same_rows_whatever_was_read_before():
    prompts = Prompts(TEXTS, 2, 0)
    assert [row["prompt"] for row in prompts.batch(7)] == read(0, 10)[12:14]
    assert [row["prompt"] for row in prompts.batch(2)] == read(0, 10)[2:4]


def test_checksum_is_of_prompts_and_columns():
    sums = {Prompts(rows, 1, 0).checksum() for rows in (["a"], ["b"], [{"prompt": "a", "x": 1}], ["a", "a"])}
    assert len(sums) == 4
    assert Prompts([{"x": 1, "prompt": "a"}], 3, 5).checksum() in sums
