"""Variations of four pictures and one edit, with the checkpoint that ships: what `make demo` runs.

python scripts/demo.py                    # writes out/demo/variations/ and out/demo/edit/
"""

import sys
import time
from pathlib import Path

from sdipc_jax import cli

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
OUTPUT = Path("out/demo")
PICTURES = ("giraffe", "automobile", "green-apple", "red-heart")
EDITED, TEXT = "automobile", "taxi"


def main() -> int:
    started = time.monotonic()
    pictures = [str(EXAMPLES / f"{name}.png") for name in PICTURES]
    edited = str(EXAMPLES / f"{EDITED}.png")
    # The same size of batch throughout: the second command runs what the first has compiled.
    common = ["--overwrite", "--num-images", "4", "--batch-size", "4"]
    commands = (
        ["vary", *pictures, "--output-dir", str(OUTPUT / "variations"), *common],
        ["edit", edited, TEXT, "--output-dir", str(OUTPUT / "edit"), *common],
    )
    for command in commands:
        shown = [word for word in command if word != "--overwrite"]
        print("sdipc " + " ".join(f'"{word}"' if " " in word else word for word in shown), flush=True)
        code = cli.main(command)
        if code:
            return code
    print(
        f"""
Done in {time.monotonic() - started:.0f} seconds. Look at

  {OUTPUT / "variations" / "sheet.png"}
      Each row: a drawing that the checkpoint has never seen, then four variations of it. They should show the same
      thing, drawn differently. No text was involved: the drawing itself was the prompt.
  {OUTPUT / "edit" / "sheet.png"}
      The {EDITED}, then four pictures of it with the text {TEXT!r} added to the drawing as a prompt.

The checkpoint is small (20 MB) and knows emoji-like drawings only, 64 x 64 pixels. Try your own; it takes
about as long as the edit above:

  {Path(sys.executable).parent / "sdipc"} vary PICTURE
"""
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
