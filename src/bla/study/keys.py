"""What must stay secret: the server's key, from which codes and signatures follow; tokens, of which hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from pathlib import Path

from bla.files import reading
from bla.study.errors import StudyError
from bla.study.plan import Record, Sha256

FILE = "secrets.json"
_ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # nothing that is read as another


class Keys(Record):
    """The key that signs, and the hash of the researcher's secret."""

    key: Sha256
    researcher_sha256: Sha256

    @classmethod
    def made(cls, study: Path, key: str = "") -> str:
        """Write a study's keys, a new one without `key`; the researcher's new secret is returned and not stored."""
        secret = secrets.token_urlsafe(18)
        temporary = study / f".{FILE}.{secrets.token_hex(4)}"
        temporary.touch(mode=0o600, exist_ok=False)
        keys = cls(key=key or secrets.token_hex(32), researcher_sha256=hashed(secret))
        temporary.write_text(keys.model_dump_json())
        temporary.replace(study / FILE)
        return secret

    @classmethod
    def renewed(cls, study: Path) -> str:
        """Replace the researcher's secret by a new one. What the key signed stays valid."""
        return cls.made(study, cls.load(study).key)

    @classmethod
    def load(cls, study: Path) -> Keys:
        with reading("the keys of a study", study / FILE, StudyError):
            return cls.model_validate_json((study / FILE).read_bytes())

    def signed(self, purpose: str, text: str) -> str:
        """A signature that nobody without the key can make."""
        return hmac.new(bytes.fromhex(self.key), f"{purpose}:{text}".encode(), hashlib.sha256).hexdigest()[:32]

    def verifies(self, purpose: str, text: str, signature: str) -> bool:
        return hmac.compare_digest(self.signed(purpose, text).encode(), signature.encode())

    def opens(self, secret: str) -> bool:
        return hmac.compare_digest(hashed(secret.strip()), self.researcher_sha256)

    def completion_code(self, participant: str) -> str:
        """What a person shows to be paid: nobody finds the answers by it without the key."""
        number = int(self.signed("completion", participant), 16)
        letters = ""
        for _ in range(8):
            number, place = divmod(number, len(_ALPHABET))
            letters += _ALPHABET[place]
        return f"{letters[:4]}-{letters[4:]}"


def hashed(token: str) -> str:
    """What is kept of a token. It is random, so a plain hash cannot be searched."""
    return hashlib.sha256(token.encode()).hexdigest()
