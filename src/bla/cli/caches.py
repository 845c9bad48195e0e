"""`bla cache`: list, check and remove cached features."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import App, Parameter

from bla.cli.sharing import DONE, DONE_BUT, CacheFolder, Json

caches = App(name="cache", help="List, check and remove cached features.", help_format="plaintext")


@caches.command(name="list")
def list_caches(*, cache: CacheFolder = None, json_: Annotated[Json, Parameter(name="--json")] = False) -> int:
    """List what is cached."""
    from bla.files import cache_root
    from bla.training.cache import listed

    entries = listed(cache)
    if json_:
        print(json.dumps({"root": str(cache or cache_root()), "caches": entries}))
        return DONE
    for entry in entries:
        state = "" if entry["complete"] else f"  incomplete, {entry['done']} done"
        print(
            f"{entry['key'][:12]}  {entry['bytes'] / 1e6:9.1f} MB  {entry['images']:7} images  "
            f"{entry['classifier']}  {entry['data']}  {entry['created']}{state}"
        )
    print(f"{len(entries)} in {cache or cache_root()}, {sum(entry['bytes'] for entry in entries) / 1e6:.1f} MB")
    return DONE


@caches.command(name="remove")
def remove_caches(
    keys: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    /,
    *,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    cache: CacheFolder = None,
) -> int:
    """Remove caches by key, or by the beginning of one.

    Parameters
    ----------
    keys
        As `bla cache list` shows them.
    all_
        Every one.
    """
    from bla.training.cache import CacheError, listed, remove

    chosen = [entry["key"] for entry in listed(cache)] if all_ else list(keys or [])
    if not chosen and not all_:
        raise CacheError("expected keys of caches to remove, or --all, got neither: `bla cache list` shows them")
    for key in remove(chosen, cache):
        print(f"removed {key[:12]}")
    return DONE


@caches.command(name="check")
def check_caches(*, cache: CacheFolder = None) -> int:
    """Read every complete cache in full against its checksums."""
    from bla.files import cache_root
    from bla.training.cache import damaged, listed

    root = cache or cache_root()
    bad = 0
    for entry in listed(cache):
        if entry["complete"]:
            files = damaged(root / entry["key"])
            bad += bool(files)
            print(f"{entry['key'][:12]}  {'damaged: ' + ', '.join(files) if files else 'whole'}")
    return DONE_BUT if bad else DONE
