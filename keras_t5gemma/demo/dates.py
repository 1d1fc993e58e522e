"""A small task with right answers: a date in any of a dozen forms becomes ISO 8601.

"Mar 5th, 2024" becomes "2024-03-05". The standard library makes any number of examples without a download, and a reader
can check each answer.
"""

import datetime
import random
from collections.abc import Callable, Sequence

# The hundred years of two-digit years, as for `%y` in `time.strptime`.
FIRST = datetime.date(1969, 1, 1)
LAST = datetime.date(2068, 12, 31)

# Templates of `str.format`. Names of months and days are English unless the program has called `locale.setlocale`.
# Dates in digits only come in three orders, and the separator says which.
FORMS = (
    "{date.day} {date:%B} {date.year}",  # 5 March 2024
    "{date:%B} {date.day}, {date.year}",  # March 5, 2024
    "{date:%b} {ordinal}, {date.year}",  # Mar 5th, 2024
    "the {ordinal} of {date:%B} {date.year}",  # the 5th of March 2024
    "{date:%A}, {date:%B} {ordinal} {date.year}",  # Tuesday, March 5th 2024
    "{date:%a, %d %b %Y}",  # Tue, 05 Mar 2024
    "{date:%a %b %d %H:%M:%S %Y}",  # Tue Mar 05 00:00:00 2024
    "{date:%d-%b-%Y}",  # 05-Mar-2024
    "{date:%d %b %y}",  # 05 Mar 24
    "{date:%d.%m.%Y}",  # 05.03.2024
    "{date:%m/%d/%Y}",  # 03/05/2024
    "{date:%Y%m%d}",  # 20240305
)


def write_date(date: datetime.date, form: str) -> str:
    """Writes a date as text.

    Args:
        date: a `datetime.date`.
        form: one of `FORMS`.

    Returns:
        A string.
    """
    suffixes = {1: "st", 2: "nd", 3: "rd"}
    suffix = "th" if date.day in (11, 12, 13) else suffixes.get(date.day % 10, "th")
    return form.format(date=date, ordinal=f"{date.day}{suffix}")


def split_dates(held_out: int = 200, seed: int = 0) -> tuple[list[datetime.date], list[datetime.date]]:
    """Splits the 36,525 dates of a hundred years.

    Args:
        held_out: number of dates to evaluate on.
        seed: seed of their order.

    Returns:
        (train, held_out): two lists of `datetime.date`, in random order.
    """
    dates = [datetime.date.fromordinal(day) for day in range(FIRST.toordinal(), LAST.toordinal() + 1)]
    random.Random(seed).shuffle(dates)
    return dates[held_out:], dates[:held_out]


def date_pairs(
    dates: Sequence[datetime.date],
    count: int | None = None,
    seed: int = 0,
    forms: Sequence[str] = FORMS,
    answer: Callable[[datetime.date], str] = datetime.date.isoformat,
) -> dict[str, list[str]]:
    """Makes pairs of texts for `fit`.

    Args:
        dates: a list of `datetime.date`.
        count: number of pairs; dates are used again after the last one. By default one pair per date.
        seed: seed of the forms.
        forms: templates as in `FORMS`.
        answer: a function of a date that returns the answer.

    Returns:
        {"encoder_text": dates as written, "decoder_text": answers}, two lists of `count` strings.
    """
    generator = random.Random(seed)
    dates = [dates[index % len(dates)] for index in range(len(dates) if count is None else count)]
    return {
        "encoder_text": [write_date(date, generator.choice(forms)) for date in dates],
        "decoder_text": [answer(date) for date in dates],
    }
