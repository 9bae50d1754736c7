"""The live page: a snapshot as words. No I/O.

What changes is made once, here, as a tree of plain lists: `to_html` writes it into the page, so
that it can be read without JavaScript, and as JSON it goes to the script of the page, which makes
text nodes of its strings. Names come from strangers: nowhere is one taken for HTML.

A tree is a string, or [tag, attributes, child, ...]. An element with `data-since` or `data-until`
(Unix seconds) shows the time from then, or until then; both sides write it.
"""

from __future__ import annotations

import html
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from rendezvous_server.status import JOBS_SHOWN, LATELY_SECONDS, RANKS_SHOWN, Snapshot

STYLE, SCRIPT = ((files(__package__) / name).read_text("utf-8") for name in ("page.css", "page.js"))

Tree = str | list[Any]
Rows = list[list[Tree]]

REFUSED = {
    "AuthenticationFailed": "no token, or a wrong or expired one",
    "RankTaken": "the rank is there already",
    "JobFull": "another size, or the job runs already",
    "ServerDraining": "while shutting down",
    "ProtocolError": "something else than a rank",
    "RendezvousError": "a limit, or an old epoch",
    "RelayFull": "no room on the relay",
    "Legacy": "a TCPunch client",
}
DRAINING: Tree = [
    *("p", {"class": "alert"}, ["span", {"class": "badge"}, "DRAINING"]),
    " The server is shutting down: nobody new may join.",
]
UNKNOWABLE = (
    "The server brings pairs of ranks together and then sees only what it relays. Whether the "
    "other pairs met directly, and how many bytes went that way, it does not know."
)


def document(snapshot: Snapshot) -> str:
    """Return the page."""
    query = snapshot["query"]
    text = "" if query["exact"] else query["text"]
    return f"""<!doctype html>
<html lang="en">{_head(title(snapshot))}
<body data-now="{snapshot["now"]}">
<header><h1>Rendezvous server</h1><p id="line" role="status">A snapshot; reload for a new one.</p>
<form><label>Jobs with <input name="q" value="{html.escape(text)}" maxlength="256"
type="search" placeholder="part of a name" autocapitalize="off"></label>
<button>Search</button></form></header>
{to_html(main(snapshot), snapshot["now"])}
<script>{SCRIPT}</script></body></html>
"""


def form(said: str) -> str:
    """Return the page that asks for the token."""
    return f"""<!doctype html>
<html lang="en">{_head("Sign in")}
<body><main class="login"><h1>Rendezvous server</h1><p role="alert">{html.escape(said)}</p>
<form method="post" action="login"><label>Admin token
<input name="token" type="password" required autofocus autocomplete="current-password"></label>
<button>Sign in</button></form>
<p class="note">It is what --admin-token-file or RENDEZVOUS_ADMIN_TOKEN of the server says.</p>
</main></body></html>
"""


def _head(text: str) -> str:
    return f"""<head><meta charset="utf-8"><title>{html.escape(text)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>{STYLE}</style></head>"""


def title(snapshot: Snapshot) -> str:
    """Return what the tab says: how many jobs need somebody to look."""
    counts = snapshot["counts"]
    parts = [f"{counts['waiting']:,} waiting"] if counts["waiting"] else []
    parts += [f"{counts['troubled']:,} in trouble"] if counts["troubled"] else []
    return ", ".join(parts or ["all well"]) + " \N{EN DASH} rendezvous server"


def to_html(tree: Tree, now: float) -> str:
    """Write a tree; ages are those at `now`."""
    if isinstance(tree, str):
        return html.escape(tree)
    tag, attributes, *children = tree
    written = "".join(f' {name}="{html.escape(str(v))}"' for name, v in attributes.items())
    inside = "".join(to_html(child, now) for child in children)
    if "data-since" in attributes:
        inside = duration(now - attributes["data-since"])
    elif "data-until" in attributes:
        inside = duration(attributes["data-until"] - now)
    return f"<{tag}{written}>{inside}</{tag}>"


def main(snapshot: Snapshot) -> Tree:
    """Return all that changes."""
    exact = snapshot["query"]["exact"]
    return [
        "main",
        {},
        *([DRAINING] if snapshot["server"]["draining"] else []),
        *([] if exact else [_server(snapshot)]),
        _jobs(snapshot),
        *_ended_jobs(snapshot),
        *([] if exact else _refusals(snapshot)),
        ["p", {"class": "note"}, UNKNOWABLE],
    ]


# ----------------------------------------------------------------------------- the server
def _server(snapshot: Snapshot) -> Tree:
    server, counts = snapshot["server"], snapshot["counts"]
    relay = "off (--no-relay)"
    if server["relay"]:
        pairs = f"{server['relay_pairs_now']:,} pairs now, {server['relay_pairs']:,} in all"
        relay = f"{pairs}, {_bytes(server['relay_bytes'])}"
    facts: list[tuple[str, Tree]] = [
        ("version", server["version"]),
        ("up for", _since(server["started"])),
        ("connections", f"{server['connections_now']:,} now, {server['connections']:,} in all"),
        ("ranks", f"{counts['ranks']:,} now, {server['joins']:,} in all, {server['lost']:,} lost"),
        ("jobs", f"{counts['jobs']:,} now, {server['jobs_started']:,} began to run"),
        ("pairs introduced", f"{server['links']:,}"),
        ("relayed", relay),
        ("refused", f"{server['refused']:,} connections"),
    ]
    if server["legacy"]:
        legacy = f"{server['legacy_waiting']:,} wait, {server['legacy_pairs']:,} pairs met"
        facts.append(("TCPunch clients", legacy))
    rows = [["div", {}, ["dt", {}, name], ["dd", {}, value]] for name, value in facts]
    return ["section", {"aria-label": "Server", "class": "server"}, ["dl", {}, *rows]]


# ------------------------------------------------------------------------------- the jobs
def _jobs(snapshot: Snapshot) -> Tree:
    query, jobs, counts = snapshot["query"], snapshot["jobs"], snapshot["counts"]
    limit = snapshot["server"]["relay_bytes_limit"]
    if query["exact"]:
        heading: list[Tree] = ["Job ", _name(query["text"]), " ", _link("?", "all jobs")]
    else:
        heading = ["Jobs"]
    body = [_job(job, limit) for job in jobs]
    parts: list[Tree] = [["h2", {}, *heading]]
    if not query["exact"]:
        parts.append(["p", {}, _summary(snapshot)])
    if not jobs and (query["exact"] or query["text"] or not counts["jobs"]):
        parts.append(["p", {"class": "note"}, _nothing(snapshot)])
    return ["section", {"aria-label": "Jobs"}, *parts, *body]


def _summary(snapshot: Snapshot) -> str:
    counts, query = snapshot["counts"], snapshot["query"]
    text = (
        f"{counts['waiting']:,} waiting, {counts['running']:,} running, "
        f"{counts['troubled']:,} of these in trouble."
    )
    if query["text"]:
        text += f" {snapshot['matching']:,} have “{shown(query['text'])}” in their name."
    if snapshot["matching"] > len(snapshot["jobs"]):
        text += f" Shown: the {JOBS_SHOWN} that are in trouble, or wait, for longest."
    return text


def _nothing(snapshot: Snapshot) -> str:
    if snapshot["query"]["exact"]:
        return "There is no job of this name now."
    return "No job is here." if not snapshot["query"]["text"] else "No job here has such a name."


def _job(job: Snapshot, limit: int) -> Tree:
    kind = _kind(job)
    parts: list[Tree] = [
        [
            "h3",
            {},
            _badge(kind),
            " ",
            _link(_job_link(job["name"]), _name(job["name"])),
            *_epoch(job),
        ],
        ["p", {"class": "says"}, *_says(job)],
        *_lost(job),
        *_said(job),
    ]
    if job["state"] == "WAITING":
        parts.append(["progress", {"max": job["size"], "value": job["here"], "aria-label": "here"}])
    parts.append(["p", {"class": "more"}, *_more(job, limit)])
    return ["article", {"class": kind.lower()}, *parts, *_details(job)]


def _kind(job: Snapshot) -> str:
    if job["lost_count"]:
        return "LOST"
    return "TROUBLE" if job["state"] == "RUNNING" and job["said"] else str(job["state"])


def _epoch(job: Snapshot) -> list[Tree]:
    return [["small", {}, f" epoch {job['epoch']}"]] if job["epoch"] else []


def _says(job: Snapshot) -> list[Tree]:
    """What is the matter, in one sentence."""
    here = f"{job['here']:,} of {job['size']:,} ranks here"
    if job["state"] == "WAITING":
        whom = f"for {_ranks(job['missing'])}"
        return [f"{here}, waiting ", _since(job["began"]), " ", ["strong", {}, whom]]
    parts = [f"{job['left']:,} left"] if job["left"] else []
    parts += [f"{job['lost_count']:,} lost"] if job["lost_count"] else []
    return [", ".join([here, *parts]) + "; running for ", _since(job["ready"])]


def _ranks(text: str) -> str:
    many = text.replace("-", "\N{EN DASH}")
    return f"rank {text}" if text.isdigit() else f"ranks {many}"


def _lost(job: Snapshot) -> list[Tree]:
    rows: list[Tree] = [
        ["li", {}, f"rank {each['rank']} lost ", _since(each["at"]), f" ago: {shown(each['why'])}"]
        for each in job["lost"]
    ]
    if job["lost_count"] > len(rows):
        rows.append(["li", {}, f"and {job['lost_count'] - len(rows):,} more after these"])
    return [["ul", {"class": "lost"}, *rows]] if rows else []


def _said(job: Snapshot) -> list[Tree]:
    said = job["said"]
    if said is None:
        return []
    who = "the server" if said["by"] is None else f"rank {said['by']}"
    what = "ended it"
    if said["kind"] in ("timeout", "missing"):
        what = f"waited in vain for {_ranks(said['about'])}" if said["about"] else "waited in vain"
    where = f" in {shown(said['operation'])}" if said["operation"] else ""
    return [["p", {"class": "said"}, f"{who} {what}{where}: {shown(said['reason'])}"]]


def _more(job: Snapshot, limit: int) -> list[Tree]:
    parts: list[Tree] = []
    if latest := job.get("latest"):
        parts += [f"last came rank {latest['rank']}, ", _since(latest["joined"])]
        parts += [f" ago, from {latest['address']} · "]
    if job["state"] == "RUNNING":
        parts += [_links(job, limit), " · "]
    return [*parts, "the server ends it in ", ["time", {"data-until": job["expires"]}]]


def _links(job: Snapshot, limit: int) -> str:
    links = f"{_count(job['links'], 'pair')} introduced"
    if not job["links_relayed"]:
        return f"{links}, none relayed"
    now = f" ({job['relay_pairs']:,} now)" if job.get("relay_pairs") else ""
    passed = f"{_bytes(job['relay_bytes'])} of at most {_bytes(limit)}"
    return f"{links}, {job['links_relayed']:,} of these relayed{now}: {passed}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _details(job: Snapshot) -> list[Tree]:
    """The ranks one by one, where the job was asked for."""
    if "ranks" not in job:
        return []
    parts: list[Tree] = []
    if job["left_ranks"]:
        parts.append(["p", {}, f"Left: {_ranks(job['left_ranks'])}"])
    if job["relaying"]:
        rows: Rows = [[_pair(p["ranks"]), _bytes(p["bytes"])] for p in job["relaying"]]
        parts.append(_table("On the relay now", ["ranks", "passed on"], rows))
    ranks = [[str(r["rank"]), _since(r["joined"]), r["address"]] for r in job["ranks"]]
    parts.append(_table("Ranks here", ["rank", "here for", "from"], ranks))
    if job["here"] > len(ranks):
        parts.append(["p", {"class": "note"}, f"The first {RANKS_SHOWN} of {job['here']:,}."])
    return parts


def _pair(ranks: list[int]) -> str:
    return " and ".join(map(str, ranks))


def _table(caption: str, names: list[str], rows: Rows) -> Tree:
    head: Tree = ["tr", {}, *(["th", {"scope": "col"}, name] for name in names)]
    body: list[Tree] = [["tr", {}, *(["td", {}, cell] for cell in row)] for row in rows]
    return [
        *("table", {}, ["caption", {}, caption]),
        *(["thead", {}, head], ["tbody", {}, *body]),
    ]


# --------------------------------------------------------------- what was, and who may not
def _ended_jobs(snapshot: Snapshot) -> list[Tree]:
    ended = snapshot["ended"]
    if not ended:
        return []
    limit = snapshot["server"]["relay_bytes_limit"]
    items = [_ended(job, limit) for job in ended]
    return [["section", {"aria-label": "Ended"}, ["h2", {}, "Ended lately"], *items]]


def _ended(job: Snapshot, limit: int) -> Tree:
    kind = "ENDED" if job["well"] else "FAILED" if job["complete"] else "NEVER BEGAN"
    link = _link(_job_link(job["name"]), _name(job["name"]))
    took = job["ended"] - (job["ready"] if job["complete"] else job["began"])
    what = "ran for" if job["complete"] else "waited for"
    return [
        "article",
        {"class": "ended" if job["well"] else "lost"},
        ["h3", {}, _badge(kind), " ", link, *_epoch(job)],
        ["p", {"class": "says"}, _fate(job), ", ", _since(job["ended"]), " ago"],
        *_lost(job),
        *_said(job),
        [
            "p",
            {"class": "more"},
            f"{_count(job['size'], 'rank')}, {what} {duration(took)} · {_links(job, limit)}",
        ],
    ]


def _fate(job: Snapshot) -> str:
    if not job["complete"]:
        came = f"{job['came']:,} of {job['size']:,} ranks came"
        if not job["never_came"]:
            return f"{came}, but were never here together"
        return f"{came}, {_ranks(job['never_came'])} never did"
    if job["lost_count"]:
        return f"{job['lost_count']:,} of {job['size']:,} ranks lost"
    return "all ranks left" if job["well"] else "it was ended"


def _refusals(snapshot: Snapshot) -> list[Tree]:
    if not snapshot["refusals"]:
        return []
    rows = [
        [
            REFUSED.get(r["kind"], r["kind"]),
            _count(r["count"], "time"),
            ["span", {}, "latest ", _since(r["at"]), " ago"],
            *(f"from {r['address']}", shown(r["why"])),
        ]
        for r in snapshot["refusals"]
    ]
    least = "at least, " if snapshot["refusals_overflow"] else ""
    caption = f"Refused connections ({least}in the last {LATELY_SECONDS / 60:.0f} minutes)"
    names = ["because of", "how often", "when", "whom", "what it was told"]
    table = _table(caption, names, rows)
    return [["section", {"aria-label": "Refused", "class": "wide"}, table]]


# ------------------------------------------------------------------------------ small parts
def _badge(text: str) -> Tree:
    return ["span", {"class": "badge"}, text]


def _link(href: str, child: Tree) -> Tree:
    return ["a", {"href": href}, child]


def _job_link(name: str) -> str:
    return "?" + urlencode({"job": name})


def _name(name: str) -> Tree:
    """A job's name, which must not turn round the text beside it either."""
    return ["bdi", {}, shown(name)]


def _since(seconds: float) -> Tree:
    return ["time", {"data-since": seconds}]


def shown(text: str) -> str:
    """Return text with what cannot be seen made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(seconds: float) -> str:
    """Return "3 min 12 s", as the script of the page does."""
    whole = max(0, int(seconds))
    for unit, name, part, small in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part} {small}"
    return f"{whole} s"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.2f} TB"
