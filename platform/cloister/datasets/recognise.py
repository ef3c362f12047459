"""Recognisers of personal data: what a cell looks like, by form and check digits.

Guarantees: a recogniser with check digits counts a cell only if they are right; whatever a cell holds, matching takes
time linear in its length. A recogniser's answer is a count and never a value.

Not promised: that what is counted is personal data (one in ten or eleven numbers has a right check digit by chance,
so that recognisers of bare digits report a column only when half of its cells fit), or that what is not counted is
none.

Sources: ISO/IEC 7812-1 (Luhn), ISO 13616 (IBAN), ISO/IEC 7064, ITU-T E.164, and the public definitions of the issuing
authorities for each national number.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

LEAST_SHARE = 0.5
"""Of the filled cells: what a recogniser of bare digits needs to report a column."""

MAX_CHARACTERS = 4096
"""Of a cell that are looked at."""


@dataclass(frozen=True, slots=True)
class Recogniser:
    """`strict` ones have a form of their own and are found anywhere in a cell; the others must fill it."""

    name: str
    pattern: re.Pattern[str]
    holds: Callable[[str], bool]
    strict: bool

    def finds(self, text: str) -> bool:
        """Whether the cell is, or in a strict one's case has in it, what this recognises."""
        if not self.strict:
            return bool(self.pattern.fullmatch(text)) and self.holds(text)
        return any(self.holds(match.group()) for match in self.pattern.finditer(text))


def recognise(cells: Mapping[str, int]) -> dict[str, int]:
    """How many cells each recogniser finds, of a column given as its distinct cells and how often each occurs."""
    found: dict[str, int] = {}
    filled = sum(cells.values())
    for recogniser in RECOGNISERS:
        count = sum(times for text, times in cells.items() if recogniser.finds(text[:MAX_CHARACTERS].strip()))
        if count and (recogniser.strict or count >= LEAST_SHARE * filled):
            found[recogniser.name] = count
    return found


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = sum(int(digit) for digit in digits[-1::-2])
    return (total + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])) % 10 == 0


def _digits(text: str) -> str:
    return re.sub(r"[^0-9]", "", text)


def _weighted(digits: str, weights: tuple[int, ...]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=False))


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        date(year, month, day)
    except ValueError:
        return False
    return True


def _any(_text: str) -> bool:
    return True


def _phone(text: str) -> bool:
    return 8 <= len(_digits(text)) <= 15


def _card(text: str) -> bool:
    digits = _digits(text)
    brand = re.fullmatch(
        r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
        r"|3(?:0[0-5]|[68]\d)\d{11}|6(?:011|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}",
        digits,
    )
    return bool(brand) and luhn(digits)


def _iban(text: str) -> bool:
    packed = text.replace(" ", "")
    if not 15 <= len(packed) <= 34:
        return False
    return int("".join(str(int(letter, 36)) for letter in packed[4:] + packed[:4])) % 97 == 1


def _ip_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not address.is_unspecified


def _spain(text: str) -> bool:
    packed = re.sub(r"[ -]", "", text).upper()
    number = packed[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == packed[-1]


def _france(text: str) -> bool:
    packed = text.replace(" ", "").upper().replace("2A", "19").replace("2B", "18")
    return 97 - int(packed[:13]) % 97 == int(packed[13:])


def _netherlands(text: str) -> bool:
    digits = _digits(text)
    return int(digits) > 0 and _weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0


def _belgium(text: str) -> bool:
    digits = _digits(text)
    body, check = int(digits[:9]), int(digits[9:])
    born = int(digits[2:4]) % 20 <= 12 and int(digits[4:6]) <= 31
    return born and check in (97 - body % 97, 97 - (2_000_000_000 + body) % 97)


_ITALY_ODD = dict(zip("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", (
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21,
    1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23,
), strict=True))  # fmt: skip


def _italy(text: str) -> bool:
    packed = text.upper()
    odd = sum(_ITALY_ODD[letter] for letter in packed[0:15:2])
    even = sum(int(letter, 36) - (10 if letter.isalpha() else 0) for letter in packed[1:15:2])
    return chr(65 + (odd + even) % 26) == packed[15]


def _poland(text: str) -> bool:
    month, day = int(text[2:4]) % 20, int(text[4:6])
    check = (10 - _weighted(text, (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10) % 10
    return 1 <= month <= 12 and 1 <= day <= 31 and check == int(text[10])


def _sweden(text: str) -> bool:
    digits = _digits(text)[-10:]
    day = int(digits[4:6])
    # A coordination number adds 60 to the day.
    return 1 <= int(digits[2:4]) <= 12 and 1 <= (day - 60 if day > 60 else day) <= 31 and luhn(digits)


def _finland(text: str) -> bool:
    packed = text.upper()
    number = int(packed[:6] + packed[7:10])
    born = 1 <= int(packed[:2]) <= 31 and 1 <= int(packed[2:4]) <= 12
    return born and "0123456789ABCDEFHJKLMNPRSTUVWXY"[number % 31] == packed[10]


def _norway(text: str) -> bool:
    digits = _digits(text)
    first = -_weighted(digits, (3, 7, 6, 1, 8, 9, 4, 5, 2)) % 11
    second = -_weighted(digits, (5, 4, 3, 2, 7, 6, 5, 4, 3, 2)) % 11
    return int(digits[9]) == first and int(digits[10]) == second


def _germany(text: str) -> bool:
    digits = _digits(text)
    product = 10  # ISO/IEC 7064, MOD 11,10
    for digit in digits[:10]:
        total = (int(digit) + product) % 10 or 10
        product = 2 * total % 11
    # Of the first ten digits one occurs twice or three times, the others at most once.
    repeats = sorted((digits[:10].count(digit) for digit in set(digits[:10])), reverse=True)
    return (11 - product) % 10 == int(digits[10]) and 2 <= repeats[0] <= 3 and set(repeats[1:]) <= {1}


def _united_kingdom(text: str) -> bool:
    digits = _digits(text)
    check = 11 - _weighted(digits, (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11
    return (0 if check == 11 else check) == int(digits[9])


def _brazil(text: str) -> bool:
    digits = _digits(text)
    first = _weighted(digits, (10, 9, 8, 7, 6, 5, 4, 3, 2)) * 10 % 11 % 10
    second = _weighted(digits, (11, 10, 9, 8, 7, 6, 5, 4, 3, 2)) * 10 % 11 % 10
    return len(set(digits)) > 1 and digits[9:] == f"{first}{second}"


def _switzerland(text: str) -> bool:
    digits = _digits(text)
    return -_weighted(digits, (1, 3) * 6) % 10 == int(digits[12])


def _united_states(text: str) -> bool:
    area, group, serial = text.split("-")
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _calendar(text: str) -> bool:
    parts = [int(part) for part in re.findall(r"\d+", text)[:3]]
    if parts[0] > 31:
        return _is_date(parts[0], parts[1], parts[2]) and 1880 <= parts[0] <= 2100
    day, month, year = parts
    return 1880 <= year <= 2100 and (_is_date(year, month, day) or _is_date(year, day, month))


def _strict(name: str, pattern: str, holds: Callable[[str], bool] = _any) -> Recogniser:
    # Not inside a longer run of letters and digits, of which a part would fit by chance.
    return Recogniser(name, re.compile(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", re.ASCII), holds, strict=True)


def _bare(name: str, pattern: str, holds: Callable[[str], bool]) -> Recogniser:
    return Recogniser(name, re.compile(pattern, re.ASCII), holds, strict=False)


DATE = "date"
RECOGNISERS = (
    _strict("e-mail", r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"),
    Recogniser(
        "phone", re.compile(r"(?<![0-9+])\+[1-9](?:[ ()./-]{0,2}\d){7,14}(?!\d)", re.ASCII), _phone, strict=True
    ),
    _bare("phone (national)", r"\(?0\d{1,5}\)?(?:[ ./-]{1,3}\d{1,8}){1,5}", _phone),
    _strict("payment card", r"\d(?:[ -]?\d){12,18}", _card),
    _strict("IBAN", r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}", _iban),
    _strict("IP address", r"\d{1,3}(?:\.\d{1,3}){3}", _ip_address),
    _bare("IP address (version 6)", r"(?=.*:.*:)[0-9A-Fa-f:.]{2,45}", _ip_address),
    _strict("ES DNI or NIE", r"(?:\d{8}|[XYZxyz]-?\d{7})[ -]?[A-HJ-NP-TV-Za-hj-np-tv-z]", _spain),
    _strict("FR NIR", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[ABab]) ?\d{3} ?\d{3} ?\d\d", _france),
    _strict("BE national number", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", _belgium),
    _strict("IT codice fiscale", r"[A-Za-z]{6}\d\d[A-EHLMPRSTa-ehlmprst]\d\d[A-Za-z]\d{3}[A-Za-z]", _italy),
    _strict("SE personnummer", r"(?:\d\d)?\d{6}[-+]\d{4}", _sweden),
    _strict("FI henkilötunnus", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]", _finland),
    _strict("BR CPF", r"\d{3}\.\d{3}\.\d{3}-\d\d", _brazil),
    _strict("CH AHV number", r"756(?:\.\d{4}\.\d{4}\.\d\d|\d{10})", _switzerland),
    _strict("US SSN", r"\d{3}-\d\d-\d{4}", _united_states),
    _bare("BE national number (bare)", r"\d{11}", _belgium),
    _bare("BR CPF (bare)", r"\d{11}", _brazil),
    _bare("PL PESEL", r"\d{11}", _poland),
    _bare("DE Steuer-ID", r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}", _germany),
    _bare("NO fødselsnummer", r"\d{6} ?\d{5}", _norway),
    _bare("NL BSN", r"\d{9}", _netherlands),
    _bare("UK NHS number", r"\d{3}[ -]?\d{3}[ -]?\d{4}", _united_kingdom),
    _bare(DATE, r"(?:\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{4})(?:[T ].{1,30})?", _calendar),
)
