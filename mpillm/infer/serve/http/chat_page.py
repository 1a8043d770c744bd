"""The chat page: one HTML file that asks its own server alone."""

import base64
import hashlib
import re
from pathlib import Path

import jinja2

TEMPLATE = Path(__file__).with_name("chat_page.html.j2")
# What the page is made of, and nothing else: no other script, style, picture, frame or host.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ChatPage:
    """The page of one model, and the headers that bound it."""

    def __init__(self, name: str, chats: bool, asks_token: bool) -> None:
        """`chats`: whether the model has a chat template; else the page continues texts."""
        environment = jinja2.Environment(autoescape=True, trim_blocks=True)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        self.text = template.render(name=name, chats=chats, asks_token=asks_token)
        hashes = {part: self._hash(part) for part in ("script", "style")}
        self.headers = {
            "Content-Security-Policy": POLICY.format(**hashes),
            "Cache-Control": "no-store",
            "X-Frame-Options": "DENY",
        }

    def _hash(self, part: str) -> str:
        """Return the source of a policy that fits the page's one `part`."""
        [content] = re.findall(f"<{part}>(.*?)</{part}>", self.text, re.DOTALL)
        digest = hashlib.sha256(content.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"
