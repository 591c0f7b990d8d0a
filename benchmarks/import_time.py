"""What `import gjflax` costs beside `import flax.linen, optax`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys

from timing import interleaved, ratio


def fresh(statement: str) -> None:
    subprocess.run([sys.executable, "-c", statement], check=True)


if __name__ == "__main__":
    times = interleaved(
        {
            "flax, optax": lambda: fresh("import flax.linen, optax"),
            "gjflax": lambda: fresh("import flax.linen, optax, gjflax"),
        },
        rounds=9,
    )
    for name, seconds in times.items():
        print(f"{name:12} {sorted(seconds)[len(seconds) // 2]:.2f} s")
    print(f"ratio        {ratio(times, 'gjflax', 'flax, optax'):.3f}")
