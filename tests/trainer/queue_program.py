"""In the place of ``ltkernels`` in the tests of the queue: takes its arguments, leaves its files, trains nothing.

``RUN/behaviour`` says what is special about a run: ``slow`` works until it is told to stop, once; ``crash`` fails,
``empty`` ends without results, ``kill`` dies by a signal. Other runs become copies of the folder
``LTKERNELS_FINISHED``.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def train(folder, finished):
    recipe = json.loads((folder / "recipe.json").read_text())
    file = folder / "behaviour"
    behaviour = file.read_text() if file.is_file() else ""
    if behaviour == "slow" and not list(folder.glob("checkpoint-*.pt")):
        received = []
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
        (folder / "ready").touch()
        end = time.monotonic() + 60  # a test that failed does not leave it behind for ever
        while not received and time.monotonic() < end:
            time.sleep(0.01)
        (folder / "checkpoint-00000007.pt").touch()
        return 143
    if behaviour == "crash":
        print("\n".join(f"line {number}" for number in range(20)), flush=True)
        print("error: the loss is nan", file=sys.stderr)
        return 2
    if behaviour == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "empty":
        return 0
    for source in finished.iterdir():
        if source.name not in ("recipe.json", "metrics.json"):
            shutil.copy(source, folder)
    metrics = json.loads((finished / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"recipe_hash": recipe["hash"]}))
    return 0


def posthoc(folder, arguments):
    last = json.loads((folder / "metrics.json").read_text())["last"]
    methods = arguments[arguments.index("--methods") + 1 : arguments.index("--accelerator")]
    for name in methods:
        content = {"method": name, "settings": {}, "scores": last | {"overall": 12.0}}
        (folder / f"posthoc-{name}.json").write_text(json.dumps(content))
    return 0


def main(arguments):
    command, *rest = arguments
    folder = Path(rest[1] if command == "train" else rest[0])
    with (folder.parent / "calls").open("a") as calls:
        calls.write(f"{command} {folder.name} {os.environ['OMP_NUM_THREADS']} {' '.join(rest)}\n")
    if command == "train":
        assert rest[0] == "--resume"
        return train(folder, Path(os.environ["LTKERNELS_FINISHED"]))
    return posthoc(folder, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
