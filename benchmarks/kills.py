"""Kills commands before every file event and at random moments, and prints what became of them.

    python benchmarks/kills.py train tune --events --random 100 --write

Every killed command is run again until it ends, and compared with an undisturbed run. It takes
about two seconds a kill; without names all commands are killed. `--write` puts the counts into
docs/reliability/kills.csv and docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz.__main__ import write_figures
from tests.kill_trials import KILLED, Killer, Trials, make_inputs
from tests.kills import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*KILLED, []], default=[])
    parser.add_argument("--events", action="store_true")
    parser.add_argument("--random", type=int, default=0, metavar="KILLS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    server, wrong = Server(), []
    table = [["command", "kills", "ends", "as if undisturbed"]]
    with tempfile.TemporaryDirectory() as folder:
        place = make_inputs(Path(folder))
        for name in chosen.names or KILLED:
            if chosen.events:
                killer = Killer(server, place, name)
                trials = killer.at_events()
                print(f"every event of {killer.num_events}: {trials}", flush=True)
                wrong += trials.wrong
                table.append(_row(name, trials))
            if chosen.random:
                trials = Killer(server, place, name).at_random(chosen.random, chosen.seed)
                print(f"random moments: {trials}", flush=True)
                wrong += trials.wrong
                table.append(_row(f"{name}, at random moments", trials))
    server.close()
    if chosen.write:
        write_figures(Path(__file__).parents[1] / "docs/reliability/kills.csv", table)
    sys.exit("\n".join(wrong))


def _row(name: str, trials: Trials) -> list[str]:
    clean = trials.ends - len(trials.wrong)
    return [name, str(trials.kills), str(trials.ends), str(clean)]


if __name__ == "__main__":
    main()
