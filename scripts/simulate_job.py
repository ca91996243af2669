"""How long a large job takes on machines that are taken away, and which size of shard is best: a simulation.

python scripts/simulate_job.py                                  # 10^8 pictures on a v5e-256 slice's worth of hosts
python scripts/simulate_job.py --hosts 8 --seconds 0.0262       # on 8 hosts of 8 H100s

A host makes a picture every `--seconds`. It is taken away after a time that is exponentially distributed with the mean
`--life`, comes back after `--back` seconds, and gets ready in `--start` seconds. What it had made of its shard is lost,
finished shards are not. Hosts take the next shard of a queue, as with `--on ray`, or each has its own, as
processes with `--process-index`. A finished shard costs `--finish` seconds besides, for its last batches, its file and
its manifest.
"""

import argparse
import heapq
import random
from collections.abc import Callable


def simulate(
    pictures: int,
    shard_size: int,
    *,
    hosts: int,
    seconds: float,
    life: float,
    back: float,
    start: float,
    finish: float,
    shared: bool,
    luck: random.Random,
) -> float:
    """Seconds until the last shard is done.

    Args:
        seconds: that a host takes for a picture.
        life, back, start, finish: as the options.
        shared: whether hosts take from one queue.
    """
    whole, rest = divmod(pictures, shard_size)
    sizes = [shard_size] * whole + ([rest] if rest else [])
    queues = [sizes] if shared else [sizes[host::hosts] for host in range(hosts)]
    # Of each host: when it is free, when it is taken away, and which it is.
    events = [(start, luck.expovariate(1 / life), host) for host in range(hosts)]
    heapq.heapify(events)
    end = 0.0
    while events:
        now, gone, host = heapq.heappop(events)
        queue = queues[0 if shared else host]
        if gone < now:
            # Taken away while it got ready.
            heapq.heappush(events, (gone + back + start, gone + back + luck.expovariate(1 / life), host))
        elif queue:
            size = queue.pop()
            done = now + size * seconds + finish
            if done <= gone:
                end = max(end, done)
                heapq.heappush(events, (done, gone, host))
            else:
                queue.append(size)
                heapq.heappush(events, (gone + back + start, gone + back + luck.expovariate(1 / life), host))
    return end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., object] = parser.add_argument
    add("--pictures", type=int, default=100_000_000)
    add("--hosts", type=int, default=64)
    add("--seconds", type=float, default=1 / (0.95 * 4))
    add("--life", type=float, default=3600.0)
    add("--back", type=float, default=300.0)
    add("--start", type=float, default=180.0)
    add("--finish", type=float, default=2.0)
    add("--sizes", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    options = parser.parse_args()
    undisturbed = options.pictures * options.seconds / options.hosts
    print(f"{options.pictures:,} pictures, {options.hosts} hosts; undisturbed {undisturbed / 3600:.1f} h")
    print("| shard | a host's time for it | one queue | of undisturbed | a share for each | of undisturbed |")
    print("|---|---|---|---|---|---|")
    for size in options.sizes:
        times = [
            simulate(
                options.pictures,
                size,
                hosts=options.hosts,
                seconds=options.seconds,
                life=options.life,
                back=options.back,
                start=options.start,
                finish=options.finish,
                shared=shared,
                luck=random.Random(26),
            )
            for shared in (True, False)
        ]
        cells = " | ".join(f"{time / 3600:.1f} h | {time / undisturbed:.2f}" for time in times)
        print(f"| {size:,} | {size * options.seconds / 60:.1f} min | {cells} |")


if __name__ == "__main__":
    main()
