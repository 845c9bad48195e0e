"""`bla cache`: list, check and remove cached features and masked answers."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter

from bla.cli.sharing import DONE, DONE_BUT, CacheFolder, Command, Flag, Json, say

about = "List, check and remove cached features and masked answers.\n\nExample: `bla cache list`"
caches = Command(name="cache", help=about, help_format="plaintext")


@caches.command(name="list")
def list_caches(*, cache: CacheFolder = None, json_: Json = False) -> None:
    """List the caches.

    Example: `bla cache list --json`
    """
    from bla.files import cache_root
    from bla.training.cache import listed

    entries, root = listed(cache), cache or cache_root()
    if json_:
        print(json.dumps({"root": str(root), "caches": entries}))
        return
    for entry in entries:
        state = "" if entry["complete"] else f"  incomplete, {entry['done']} done"
        say(
            f"{entry['key'][:12]}  {entry['bytes'] / 1e6:9.1f} MB  {entry['images']:7} images  "
            f"{entry['kind']}  {entry['classifier']}  {entry['data']}  {entry['created']}{state}"
        )
    say(f"{len(entries)} in {root}, {sum(entry['bytes'] for entry in entries) / 1e6:.1f} MB")


@caches.command(name="remove")
def remove_caches(
    keys: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
    /,
    *,
    all_: Flag = False,
    beyond: float | None = None,
    cache: CacheFolder = None,
) -> None:
    """Remove caches by keys or their first characters, or those that were not used for longest.

    Example: `bla cache remove 0c4f665f`

    :param keys: As `bla cache list` shows them.
    :param all_: Remove all caches.
    :param beyond: Remove the least recently used until so many gigabytes are left. With $BLA_CACHE_GB every new cache
        does so.
    """
    from bla.training.cache import CacheError, listed, remove, trim

    for key in [] if beyond is None else trim(1e9 * beyond, cache):
        say(f"removed {key[:12]}")
    chosen = [entry["key"] for entry in listed(cache)] if all_ else list(keys or [])
    if not chosen and not all_ and beyond is None:
        raise CacheError("expected keys of caches to remove, --all or --beyond, got none: `bla cache list` shows them")
    for key in remove(chosen, cache):
        say(f"removed {key[:12]}")


@caches.command(name="check")
def check_caches(*, cache: CacheFolder = None) -> int:
    """Check every cache against its checksums; the exit code is 3 if one is damaged.

    Example: `bla cache check`
    """
    from bla.files import cache_root
    from bla.training.cache import damaged, listed

    found = DONE
    for entry in listed(cache):
        key, bad = entry["key"], ["its record"] if entry["created"] == "damaged" else []
        if entry["complete"]:
            bad = damaged((cache or cache_root()) / key)
        if bad:
            found = DONE_BUT
        state = "damaged: " + ", ".join(bad) if bad else "whole" if entry["complete"] else "incomplete"
        say(f"{key[:12]}  {state}")
    return found
