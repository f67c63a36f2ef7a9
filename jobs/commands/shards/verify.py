"""`coatnet shards verify`: shards compared with their index."""

import sys
from typing import Annotated

import typer

from data.accounting import Accounting, lines
from data.errors import EXIT_CONFIG
from data.index import read_index
from data.indexing.scan import ScanOptions
from data.indexing.verify import verify_shards
from data.remote.storage import Storage
from jobs.commands.arguments import Anonymous, Endpoint, GiveUpAfter, Profile, ShardsElsewhere, ShardsUrl, Threads
from jobs.commands.shards.progress import reading_progress
from jobs.console import make_console, print_line
from jobs.exit_codes import STARTS_OVER, exit_on_error


def verify(
    url: ShardsUrl,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image.")] = False,
    threads: Threads = 8,
    endpoint: Endpoint = None,
    profile: Profile = None,
    anonymous: Anonymous = False,
    elsewhere: ShardsElsewhere = False,
    give_up_after: GiveUpAfter = 60,
) -> None:
    """Read shards again and compare them with their index."""
    with exit_on_error(STARTS_OVER):
        console, storage = (
            make_console(),
            Storage(endpoint, profile, anonymous, give_up_after, shards_elsewhere=elsewhere),
        )
        index = read_index(url, storage)
        problems, members = 0, Accounting("members")
        with reading_progress(console) as (begin, advance):
            for difference in verify_shards(
                index, decode_images=decode, scanning=ScanOptions(storage, threads, begin, advance), members=members
            ):
                problems += 1
                place = ": ".join(filter(None, (difference.shard and f"shard {difference.shard}", difference.key)))
                print_line(console, " ".join(filter(None, (place, difference.what))))
        for line in lines(members):
            print_line(console, line)
        if index.labels_sha256 is None:
            print_line(console, "labels were not compared: the index has no labels.npy")
        read = f"{url}: {index.samples:,} samples in {len(index.shards):,} shards, {index.bytes / 1e6:,.1f} MB"
        if problems:
            print_line(console, f"{read}: {problems:,} problems")
            sys.exit(EXIT_CONFIG)
        print_line(console, f"{read}: all as in the index{', and every image decodes' if decode else ''}")
