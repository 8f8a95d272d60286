"""What an adapter's KV is called. SGLang joins the id of a request's LoRA adapter to its extra key,
and so into every page's digest; left to itself it takes ids from names and paths, or random ones.

    launching process   an id by name and content for every adapter that lies in a folder   Names
    schedulers          after each load: is this still what was loaded?                     Adapters

Chunks of an adapter leave the process, and are asked for outside, only where its rank found the
content that the id stands for. All others (tensors, models of a hub, ids given by others, files
that were overwritten under the engine) keep to RAM: nobody could find them again, or nobody should.

An id is given twice only while the files have not been touched in between, and a load that met
other files than the id was made of fails, as SGLang's own tree tells adapters apart by nothing
else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc.weights import fingerprint, state_of

from . import compat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmc.weights import FolderState

log = logging.getLogger("lmc")

MARK = "~"
"""Begins the ids that lmc gives; SGLang's are hexadecimal, and as long."""
ID_CHARS = 32
_LOOKS_LIKE_AN_ID = re.compile(rf"{MARK}[\w-]{{{ID_CHARS - 1}}}", re.ASCII)


def id_of(name: str, folder: Path, modules: Sequence[str]) -> str:
    """What KV computed with this adapter hangs on, unique for a name. Raises OSError."""
    content = json.dumps(["lmc-adapter-v1", name, fingerprint(folder), *modules])
    digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest())
    return MARK + digest.decode()[: ID_CHARS - 1]


def modules_of(settings: Any) -> list[str] | None:
    """The parts of the model that SGLang lets adapters change: those the user named, else those
    that the adapters of the start list; an adapter's weights for others are left out. None: there
    is no telling.
    """
    if settings.lora_target_modules:
        return sorted(settings.lora_target_modules)
    listed: set[str] = set()
    for ref in settings.lora_paths or ():
        try:
            config = json.loads(Path(ref.lora_path, "adapter_config.json").read_bytes())
            targets = config["target_modules"]
            listed.update([targets] if isinstance(targets, str) else targets)
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return sorted(listed)


class Names:
    """Gives the adapters of an engine their ids, in the process that launches it."""

    def __init__(self, settings: Any) -> None:
        self._modules = modules_of(settings)
        self._seen: dict[str, FolderState] = {}

    def id_of(self, name: str, path: str) -> str | None:
        """None: SGLang's own id has to do."""
        if self._modules is None or not _is_folder(path):
            return None
        try:
            state = state_of(Path(path))
            lora_id = id_of(name, Path(path), self._modules)
        except OSError:  # SGLang will say so
            return None
        return lora_id if self._seen.setdefault(lora_id, state) == state else None


class Adapters:
    """The adapters of a rank; owned by its scheduler thread.

    Raises RuntimeError for one whose files changed since the launch.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, FolderState]] = {}  # ids whose content was found loaded
        self._others: set[str] = set()
        settings = compat.lora_settings()
        self._modules = modules_of(settings) if settings.enable_lora else None
        for ref in settings.lora_paths or () if settings.enable_lora else ():
            if changed := self.loaded(ref):
                raise RuntimeError(changed)

    def loaded(self, ref: Any) -> str:
        """SGLang has loaded an adapter; why it must not be used, or ""."""
        lora_id, name, path = ref.lora_id, ref.lora_name, ref.lora_path
        if not lora_id.startswith(MARK):
            log.info("lmc cannot tell the content of adapter %s: its chunks stay in RAM", name)
            self._others.add(lora_id)
            return ""
        try:
            state = state_of(Path(path))
            found = id_of(name, Path(path), self._modules or ())
        except OSError as error:
            return f"adapter {name} could not be read again after it was loaded: {error}"
        if found != lora_id:
            return f"adapter {name} changed on disk while it was loaded: load it again"
        self._known[lora_id] = path, state
        self._others.discard(lora_id)
        return ""

    def copied(self, lora_id: str | None) -> None:
        """SGLang took an adapter's weights to the device, from memory that may be its files'."""
        if lora_id not in self._known:
            return
        path, state = self._known[lora_id]
        try:
            touched = state_of(Path(path)) != state
        except OSError:
            touched = True
        if touched:
            log.warning("adapter %s was written to while loaded: its chunks stay in RAM", path)
            self._others.add(lora_id)
            del self._known[lora_id]

    @staticmethod
    def apart(extra_key: str) -> str:
        """For a request without adapter: an extra key that no other with an id of ours equals."""
        return extra_key + "\0" if _LOOKS_LIKE_AN_ID.search(extra_key) else extra_key

    def lasting(self, lora_id: str | None) -> bool:
        """Whether chunks of a request with this adapter, or with none, can be had from below."""
        if lora_id is None or lora_id in self._known:
            return True
        self._others.add(lora_id)
        return False

    def lasting_node(self, tree: Any, node_id: int) -> bool:
        """Whether chunks of a node may go below."""
        if not self._others:
            return True
        extra_key = compat.extra_key_of(tree, node_id) or ""
        return not any(lora_id in extra_key for lora_id in self._others)


def _is_folder(path: str) -> bool:
    """Folders only: what a hub calls by a name may be another thing tomorrow."""
    return path != compat.TENSORS and os.path.isdir(path)
