"""Feeds damaged and hostile files to every reader: `make fuzz`, or python tests/fuzz/run.py --help.

A reader reads, or raises a ValueError or OSError that names the file; it does not crash, hang, or take memory because a
header says so. With --atheris (pip install atheris) the same mutations are guided by which lines of avppc they reach.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

TESTS = Path(__file__).parents[1]
for place in (TESTS / "fuzz", TESTS, TESTS / "data" / "packed", TESTS / "data" / "video", TESTS.parent):
    sys.path.insert(0, str(place))

MOST_SECONDS = 10


class Hang(BaseException):
    """Reading took too long."""


def raise_hang(number: int, frame: FrameType | None) -> None:
    raise Hang


def limit_memory(mebibytes: int) -> None:
    """Address space that this process may have, beyond what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def try_one(reader: Any, content: bytes) -> str:
    """ "read", "refused", or what is wrong with how the reader has taken a content."""
    # of the processor's time: a machine that is busy with something else is no hang
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        reader.read(content)
        return "read"
    except ValueError as error:
        if type(error) is not ValueError:
            return f"{type(error).__name__} of the insides: {error}"
        return "refused" if "/" in str(error) else f"names no file: {error}"
    except OSError as error:
        return "refused" if error.filename else f"names no file: {error}"
    except Hang:
        return f"hangs for {MOST_SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(readers: dict[str, Any], seconds: float, count: int, first: int, findings: Path) -> int:
    """Mutations first, first + 1, ... of every reader's file in turn; returns how many kinds of wrong there were."""
    outcomes = {name: Counter[str]() for name in readers}
    wrong: set[tuple[str, str]] = set()
    end = time.monotonic() + seconds
    number = first
    while time.monotonic() < end and number < first + count:
        for name, reader in readers.items():
            rng = random.Random(f"{name} {number}")
            content = reader.mutate(reader.whole, rng)
            outcome = try_one(reader, content)
            if outcome in ("read", "refused"):
                outcomes[name][outcome] += 1
                continue
            outcomes[name]["wrong"] += 1
            if (name, outcome[:40]) not in wrong:
                wrong.add((name, outcome[:40]))
                findings.mkdir(parents=True, exist_ok=True)
                (findings / f"{name}-{number}").write_bytes(content)
                print(f"{name} {number}: {outcome[:300]!a}", flush=True)
        number += 1
    for name, counts in outcomes.items():
        print(f"{name}: {dict(counts)}")
    total = sum(sum(counts.values()) for counts in outcomes.values())
    print(f"{total} files, {len(wrong)} kinds of findings")
    return len(wrong)


def fuzz_with_atheris(reader: Any, seconds: float) -> None:
    """Endless, guided by coverage; the first finding ends it."""
    import atheris

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        try:
            return bytes(reader.mutate(data or reader.whole, rng)[:most])
        except (ValueError, TypeError, AttributeError, IndexError, KeyError):  # damaged beyond its structure
            return bytes(reader.mutate(reader.whole, rng)[:most])

    def test(data: bytes) -> None:
        outcome = try_one(reader, bytes(data))
        if outcome not in ("read", "refused"):
            raise RuntimeError(outcome)

    arguments = [
        sys.argv[0],
        f"-max_total_time={int(seconds)}",
        "-max_len=100000",
        "-rss_limit_mb=4096",
        "-verbosity=0",
    ]
    atheris.Setup([*arguments, "-print_final_stats=1"], test, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--count", type=int, default=10**9, help="mutations of each file, at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation; each gives one content")
    parser.add_argument("--reader", help="only this one")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs --reader and atheris")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"), help="folder for what was read wrongly")
    options = parser.parse_args()
    if options.atheris:
        import atheris

        with atheris.instrument_imports(include=["avppc"]):
            from readers import MOST_MIB, make_readers
    else:
        from readers import MOST_MIB, make_readers

    warnings.simplefilter("error")
    signal.signal(signal.SIGPROF, raise_hang)
    with tempfile.TemporaryDirectory() as folder:
        readers = make_readers(Path(folder))
        if options.reader:
            readers = {options.reader: readers[options.reader]}
        for name, reader in readers.items():
            if try_one(reader, reader.whole) != "read":
                raise SystemExit(f"{name}: the whole file is refused: {try_one(reader, reader.whole)}")
        if options.atheris:
            fuzz_with_atheris(readers[options.reader], options.seconds)
        limit_memory(MOST_MIB)
        return 1 if fuzz(readers, options.seconds, options.count, options.first, options.findings) else 0


if __name__ == "__main__":
    sys.exit(main())
