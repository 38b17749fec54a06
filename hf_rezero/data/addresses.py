"""Addresses of files elsewhere, and what of them may be shown: no user, no password, no query."""

import re


_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"


def shown(text: object) -> str:
    """A text whose addresses have lost their user information, query and fragment, where keys and signatures stand.

    Example:
        >>> shown("cannot open https://me:pa,ss@example.org/x.xz?token=1,2#3: it is gone")
        'cannot open https://example.org/x.xz: it is gone'
        >>> shown("s3://key:secret@bucket/a b"), shown("what is a ? b"), shown("/home/me/x")
        ('s3://bucket/a b', 'what is a ? b', '/home/me/x')
    """
    text = re.sub(rf"({_SCHEME})[^\s/?#]*@", r"\1", str(text))
    return re.sub(rf"({_SCHEME}[^\s?#'\"]*)[?#][^\s'\")]*?(?=[:,;.]?(?:[\s'\")]|$))", r"\1", text)


def is_address(name: str) -> bool:
    """Whether a name is an address that `download` fetches.

    Example:
        >>> is_address("https://example.org/x"), is_address("file.txt")
        (True, False)
    """
    return name.startswith(("http://", "https://"))
