"""Access: the one key of an installation, and the tenant in every query."""

from __future__ import annotations

import hashlib
import hmac

from pydantic import SecretStr
from sqlalchemy import ColumnElement, and_

from app.database.tables import JobRow
from app.errors import Unauthorized

DEFAULT_TENANT = "default"


def authenticate(api_key: SecretStr | None, authorization: bytes | None) -> str:
    """The tenant of a request, from the bytes of its Authorization header.

    Compared as hashes of bytes: `compare_digest` refuses non-ASCII strings, and hashes have one length. Raises
    Unauthorized when `api_key` is set and the header is missing, malformed or another key.
    """
    if api_key is None:
        return DEFAULT_TENANT
    scheme, _, given = (authorization or b"").partition(b" ")
    expected = hashlib.sha256(api_key.get_secret_value().encode()).digest()
    same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), expected)
    if scheme.lower() != b"bearer" or not same:
        raise Unauthorized
    return DEFAULT_TENANT


def visible(tenant: str) -> ColumnElement[bool]:
    """The condition under which a job exists for this tenant."""
    return and_(JobRow.tenant_id == tenant, JobRow.deleted_at.is_(None))
