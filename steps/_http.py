"""HTTP as steps need it: a client that obeys the step's environment, and what an answer says about trying again."""

import email.utils
import ssl
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers that may be different later; every other one above 399 is final."""
_TIMEOUT = httpx.Timeout(60, connect=20)


def http_client(env: Mapping[str, str]) -> httpx.Client:
    """A client with the proxies and certificates that `env` names, not those of the worker."""
    certificates = ssl.create_default_context(cafile=env.get("SSL_CERT_FILE"), capath=env.get("SSL_CERT_DIR"))
    return httpx.Client(
        timeout=_TIMEOUT,
        follow_redirects=True,
        headers={"User-Agent": "sygaldry-ray"},
        trust_env=False,
        verify=certificates,
        mounts=_proxies(env, certificates),
    )


def without_secrets(url: str) -> str:
    """`url` without user, password, query and fragment: signed addresses carry their key there."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def retry_after_s(response: httpx.Response) -> float | None:
    """What `Retry-After` says, seconds or a date, in seconds from now; None without one."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def is_certificate_error(error: BaseException | None) -> bool:
    """True when the server's certificate was refused, which no second try changes."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _proxies(env: Mapping[str, str], certificates: ssl.SSLContext) -> dict[str, httpx.BaseTransport | None]:
    mounts: dict[str, httpx.BaseTransport | None] = {}
    for scheme in ("http", "https"):
        proxy = env.get(f"{scheme}_proxy") or env.get(f"{scheme.upper()}_PROXY")
        if proxy:
            mounts[f"{scheme}://"] = httpx.HTTPTransport(proxy=proxy, verify=certificates)
    for entry in (env.get("no_proxy") or env.get("NO_PROXY") or "").split(","):
        name = entry.strip().lstrip(".")
        if name == "*":
            return {}
        if name and "/" not in name:
            exact = name == "localhost" or name[-1].isdigit()
            mounts[f"all://{name}" if exact else f"all://*{name}"] = None
    return mounts
