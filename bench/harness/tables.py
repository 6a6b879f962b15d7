"""Rows as markdown tables and as lines for the console."""

from collections.abc import Iterable
from typing import Any

from bench.harness.rows import Row

MAX_ERROR_CHARACTERS = 40  # of an error in a cell


def table(rows: Iterable[Row]) -> str:
    """The full table: ours, its floor, its memory, and each peer's time (ratio) and memory."""
    rows = list(rows)
    peers = _peer_names(rows)
    header = ["case", "shape", "ours", "floor", "of floor", "of copy", "MiB", *peers]
    return _markdown(
        header,
        (
            [
                *_what(row),
                _amount(row),
                "" if row["floor"] is None else f"{row['floor']:g}",
                percent(row["fraction_of_floor"]),
                percent(row["fraction_of_copy"]),
                _mebibytes(row["peak_memory_bytes"]),
                *(_peer(row, row["peers"].get(name)) for name in peers),
            ]
            for row in rows
        ),
    )


def brief_table(rows: Iterable[Row]) -> str:
    """A narrow table: ours, and each peer's time as a multiple of ours."""
    rows = list(rows)
    peers = _peer_names(rows)
    header = ["case", "shape", "time", "of floor", "MiB", *(f"{name} takes" for name in peers)]
    return _markdown(
        header,
        (
            [
                *_what(row),
                _amount(row),
                percent(row["fraction_of_floor"]),
                _mebibytes(row["peak_memory_bytes"]),
                *(_multiples(row, row["peers"].get(name)) for name in peers),
            ]
            for row in rows
        ),
    )


def profile_table(profile: dict[str, Any]) -> str:
    """The longest kernels of a profile."""
    return _markdown(
        ["longest", "ms", "calls", "share"],
        (
            [
                "`{}`".format(kernel["name"].replace("|", "\\|")),
                f"{kernel['ms']:.4g}",
                str(kernel["calls"]),
                f"{kernel['share']:.1%}",
            ]
            for kernel in profile["longest"]
        ),
    )


def console_line(row: Row) -> str:
    line = f"{row['case']:20} {row['metric'] or '':16} {shape(row):28} {row['dtype'] or '':9}"
    line += f" {_amount_or_error(row)}"
    if row["fraction_of_floor"]:
        line += f"  {row['fraction_of_floor']:.0%} of floor {row['floor']}"
    if row["fraction_of_copy"] is not None:
        line += f", {row['fraction_of_copy']:.0%} of copy"
    if row["peak_memory_bytes"] is not None:
        line += f", {_mebibytes(row['peak_memory_bytes'])} MiB"
    peers = [f"{name} {_amount_or_error(peer)}" for name, peer in row["peers"].items()]
    return line + ("  | " + "; ".join(peers) if peers else "")


def shape(row: Row) -> str:
    return " ".join(f"{k}={v}" for k, v in row["shape"].items())


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    """Cells as a markdown table."""
    rule = "|" + "---|" * len(header)
    return "\n".join(
        ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(c) + " |" for c in lines)]
    )


def _peer_names(rows: list[Row]) -> list[str]:
    """All peers of all rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def _what(row: Row) -> tuple[str, str]:
    """The first two cells: case and metric; shape and dtype."""
    return (
        f"{row['case']} {row['metric'] or ''}".strip(),
        f"{shape(row)} {row['dtype'] or ''}".strip(),
    )


def _amount(measured: Row) -> str:
    if measured["value"] is None:
        return "failed" if "error" in measured else ""
    return f"{measured['value']:g} {measured['unit']}"


def _amount_or_error(measured: Row) -> str:
    if "error" in measured:
        return f"ERROR {measured['error'].splitlines()[0][:80]}"
    return f"{measured['value']} {measured['unit']}"


def _peer(row: Row, peer: Row | None) -> str:
    """A peer's time, its ratio to ours, and its memory."""
    if peer is None:
        return ""
    if peer["value"] is None:
        return _short_error(peer)
    ratio = f" ({peer['value'] / row['value']:.2g}x)" if row["value"] else ""
    return f"{_amount(peer)}{ratio}, {_mebibytes(peer['peak_memory_bytes'])} MiB"


def _multiples(row: Row, peer: Row | None) -> str:
    """The peer's time and memory as multiples of ours; no multiple of less than half a MiB."""
    if peer is None:
        return ""
    if not peer["value"] or not row["value"]:
        return _short_error(peer)
    text = f"{peer['value'] / row['value']:.2g}x"
    if (row["peak_memory_bytes"] or 0) >= 2**19 and peer["peak_memory_bytes"]:
        text += f" ({peer['peak_memory_bytes'] / row['peak_memory_bytes']:.2g}x MiB)"
    return text


def _short_error(peer: Row) -> str:
    """The beginning of a peer's error; empty without one."""
    return peer.get("error", "").partition("\n")[0][:MAX_ERROR_CHARACTERS]


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def gates_table(gates: list[dict[str, Any]]) -> str:
    """The kernels for which the compile gates model issue and memory time."""
    lines = [
        "| case | registers | in loops | outside | per element | issue us | memory us | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gate in gates:
        if model := gate["model"]:
            issue, memory = model["issue_us"], model["memory_us"]
            cells = [
                gate["case"], gate["registers"], f"{model['in_loops']:.1f}",
                model["outside_loops"], f"{model['per_element']:.1f}",
                f"{issue:.3g}", f"{memory:.3g}", f"{issue / memory:.2f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
