"""The rules of the EPCM, exhaustively: every page state with every instruction, against a table that is written by hand."""

from __future__ import annotations

import itertools

import pytest

from prefault.drivers.enclave import epcm
from prefault.drivers.enclave.epcm import Code, EnclaveError, PageInfo, PageType, Refusal

_PERMISSIONS = ("", "r", "x", "rw", "rx", "rwx")  # writable and not readable does not exist

# One row for each state, one column for each instruction. The states: the type, lower case while a change waits for its
# EACCEPT (p: pending, m: modified, r: restricted). The answers: "=" the state stays, a state, or the code of the refusal.
_TABLE = """
state  EAUG    EACCEPT-REG-p EACCEPT-REG EACCEPT-TCS EACCEPT-TRIM EMODPR EMODPE  EMODT-TCS EMODT-TRIM REMOVE  READ    WRITE
free   REG-p   added         added       added       added        added  added   added     added      added   added   added
REG-p  already REG           differs     differs     differs      busy   pending busy      busy       trimmed pending pending
REG    already differs       =           differs     differs      REG-r  more    TCS-m     TRIM-m     trimmed =       =
REG-r  already differs       REG         differs     differs      REG-r  more    TCS-m     TRIM-m     trimmed =       =
TCS-m  already differs       differs     TCS         differs      busy   changed type      busy       trimmed changed changed
TCS    already differs       differs     differs     differs      type   type    type      TRIM-m     trimmed type    type
TRIM-m already differs       differs     differs     TRIM         busy   changed type      type       trimmed changed changed
TRIM   already differs       differs     differs     differs      type   type    type      type       free    type    type
"""
_CODES = {
    "added": Code.NOT_ADDED,
    "already": Code.ALREADY_ADDED,
    "differs": Code.ATTRIBUTES_MISMATCH,
    "busy": Code.NOT_MODIFIABLE,
    "pending": Code.PENDING,
    "changed": Code.MODIFIED,
    "type": Code.WRONG_TYPE,
    "trimmed": Code.NOT_TRIMMED,
}


def _read_table() -> dict[tuple[str, str], str]:
    header, *rows = _TABLE.strip().splitlines()
    found = {}
    for row in rows:
        state, *answers = row.split()
        for instruction, answer in zip(header.split()[1:], answers, strict=True):
            found[state, instruction] = answer
    return found


def _info(state: str, permissions: str) -> PageInfo | None:
    if state == "free":
        return None
    name, _, flag = state.partition("-")
    return PageInfo(
        PageType[name],
        permissions if name == "REG" else "",
        pending=flag == "p",
        modified=flag == "m",
        restricted=flag == "r",
    )


def _bits(permissions: str) -> int:
    return epcm.parse_permissions(permissions)


def _rule(instruction: str, of: str, argument: str) -> epcm.Rule:
    """Return an instruction as a rule; ``of``: permissions that the page has; ``argument``: of EMODPR and EMODPE."""
    match instruction.split("-"):
        case ["EAUG"]:
            return epcm.eaug()
        case ["EACCEPT", "REG", "p"]:
            return epcm.eaccept(PageInfo(PageType.REG, of, pending=True))
        case ["EACCEPT", "REG"]:
            return epcm.eaccept(PageInfo(PageType.REG, of))
        case ["EACCEPT", name]:
            return epcm.eaccept(PageInfo(PageType[name], "", modified=True))
        case ["EMODPR"]:
            return epcm.emodpr(_bits(argument))
        case ["EMODPE"]:
            return epcm.emodpe(_bits(argument))
        case ["EMODT", name]:
            return epcm.emodt(PageType[name])
        case ["REMOVE"]:
            return epcm.remove()
        case ["READ"]:
            return epcm.touch("read")
        case ["WRITE"]:
            return epcm.touch("write")
    raise AssertionError(instruction)


def _expected(state: str, instruction: str, of: str, argument: str, answer: str) -> PageInfo | Code | None:
    if answer in _CODES:
        return _CODES[answer]
    regular = state.startswith("REG")
    if instruction in ("READ", "WRITE") and regular:
        allowed = "w" in of if instruction == "WRITE" else of != ""
        return _info(state, of) if allowed else Code.NO_PERMISSION
    if instruction == "EMODPR" and regular:
        return _info(answer, "".join(letter for letter in "rwx" if letter in of and letter in argument))
    if instruction == "EMODPE" and regular:
        return _info(state, "".join(letter for letter in "rwx" if letter in of or letter in argument))
    if instruction == "EAUG":
        return _info(answer, "rw")
    return _info(state if answer == "=" else answer, of)


_CASES = [
    (state, instruction, of, argument, answer)
    for (state, instruction), answer in _read_table().items()
    for of in (_PERMISSIONS if state.startswith("REG") and state != "REG-p" else ("rw",))
    for argument in (_PERMISSIONS if instruction in ("EMODPR", "EMODPE") else ("",))
]


def test_c5_every_state_with_every_instruction() -> None:
    assert len(_CASES) == 396
    for state, instruction, of, argument, answer in _CASES:
        before = epcm.encode(_info(state, of))
        got = _rule(instruction, of, argument)(before)
        expected = _expected(state, instruction, of, argument, answer)
        case = (state, of, instruction, argument)
        if isinstance(expected, Code):
            assert isinstance(got, Refusal), case
            assert got.code is expected, case
        else:
            assert not isinstance(got, Refusal), (case, got)
            assert epcm.decode(got) == expected, case


def test_c5_the_tables_for_runs_are_the_rules() -> None:
    for state, instruction, of, argument, _ in _CASES:
        rule = _rule(instruction, of, argument)
        before = epcm.encode(_info(state, of))
        answer = rule(before)
        tables = epcm.translation(rule)
        if isinstance(answer, Refusal):
            with pytest.raises(EnclaveError) as caught:
                tables.apply(bytes([before] * 3), 7)
            assert caught.value.code is answer.code
            assert caught.value.page == 7
        else:
            assert tables.apply(bytes([before] * 3)) == bytes([answer] * 3)


def test_c5_a_refused_page_refuses_the_run() -> None:
    entries = bytes([epcm.encode(_info("REG", "rw"))] * 5 + [epcm.FREE])
    with pytest.raises(EnclaveError, match="page 105: EMODPR of a page that was not added") as caught:
        epcm.translation(epcm.emodpr(epcm.READ)).apply(entries, 100)
    assert caught.value.page == 105


def test_c5_states_are_encoded_one_to_one() -> None:
    infos = [
        PageInfo(kind, permissions, *flags)
        for kind in PageType
        for permissions in (*_PERMISSIONS, "w", "wx")
        for flags in itertools.product((False, True), repeat=3)
    ]
    entries = [epcm.encode(info) for info in infos]
    assert sorted(entries) == list(range(64, 256))
    assert [epcm.decode(entry) for entry in entries] == infos
    assert epcm.decode(epcm.encode(None)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: epcm.eaccept(PageInfo(PageType.REG, "rw", modified=True)),
        lambda: epcm.eaccept(PageInfo(PageType.TCS, "")),
        lambda: epcm.eaccept(PageInfo(PageType.TRIM, "", pending=True, modified=True)),
        lambda: epcm.emodpr(epcm.WRITE),
        lambda: epcm.emodpe(epcm.WRITE | epcm.EXECUTE),
        lambda: epcm.emodt(PageType.REG),
        lambda: epcm.parse_permissions("rr"),
        lambda: epcm.parse_permissions("rq"),
    ],
)
def test_c5_requests_that_are_invalid_for_every_page(make: object) -> None:
    assert callable(make)
    with pytest.raises(EnclaveError) as caught:
        make()
    assert caught.value.code is Code.INVALID_REQUEST


def test_c5_permissions_are_not_extended_beyond_those_of_the_enclave() -> None:
    with pytest.raises(EnclaveError, match="EMODPE to rx: the enclave was created for at most rw") as caught:
        epcm.emodpe(_bits("rx"), _bits("rw"))
    assert caught.value.code is Code.NOT_PERMITTED
    assert not isinstance(epcm.emodpe(_bits("rx"), _bits("rwx"))(epcm.encode(_info("REG", "r"))), Refusal)
