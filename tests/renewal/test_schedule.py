"""When a run acts: windows of the week, daylight saving time, giving way, jitter, and the units that start it."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bridge.errors import Exit, SettingsError
from bridge.monitoring import after
from bridge.node.inventory import Item
from bridge.renewal import Selection
from bridge.renewal.gate import NotYetError, hold_for_window, jitter
from bridge.settings import tables
from bridge.settings.load import parse
from bridge.settings.tables import RenewalSettings, Zone
from bridge.settings.windows import LAST_DAYS, Jitter, Window, Windows, ever_waits, local_text, may_act, spans
from bridge.specs import SPECS
from tests.kit.issuing import NOW, Signer

BERLIN = ZoneInfo("Europe/Berlin")
ROOT = Path(__file__).parents[2]
HOUR, DAY, MINUTE = timedelta(hours=1), timedelta(days=1), timedelta(minutes=1)


def windows(*texts: str) -> Windows:
    return Windows.from_setting(list(texts))


def at(text: str, zone: tzinfo = UTC) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


def first_span(now: datetime, text: str, zone: tzinfo = BERLIN) -> tuple[datetime, datetime]:
    return spans(now, windows(text), zone)[0]


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Sat-Sun 02:00-06:00", "Sat,Sun 02:00-06:00"),
        ("Fri-Mon 2:00-6:00", "Mon,Fri,Sat,Sun 02:00-06:00"),
        ("Wed 22:00-02:00", "Wed 22:00-02:00"),
        ("Mon,Thu-Fri 00:00-24:00", "Mon,Thu,Fri 00:00-24:00"),
        ("03:00-05:00", "03:00-05:00"),
        ("Sun 22:00-00:00", "Sun 22:00-24:00"),
    ],
)
def test_a_window_is_read_as_it_is_written(text: str, said: str) -> None:
    """Windows have days, ranges of days over the end of the week, and hours over midnight."""
    assert str(Window.parse(text)) == said
    assert Window.parse(said) == Window.parse(text)


@pytest.mark.parametrize(
    "value",
    [
        '"Sat"',
        '["Sat 02:00"]',
        '["Sat 02:00-02:00"]',
        '["Sat 24:00-25:00"]',
        '["Sat 02:60-03:00"]',
        '["Caturday 02:00-03:00"]',
        '["sat 02:00-03:00"]',
        '["Sat- 02:00-03:00"]',
        '["Sat  Sun 02:00-03:00"]',
        "[2]",
        "true",
    ],
)
def test_anything_else_is_a_settings_error_with_its_line(value: str) -> None:
    """The error shows an example of a right value."""
    with pytest.raises(SettingsError) as e:
        parse(f"[renewal]\nwindow = {value}\n")
    [problem] = e.value.problems
    assert (problem.key, problem.line) == ("renewal.window", 2)
    assert "Sat-Sun 02:00-06:00" in problem.wanted


def test_settings_hold_windows_zone_and_jitter() -> None:
    """One window may stand without a list."""
    renewal = parse('[renewal]\nwindow = "Sat 02:00-03:00"\nwindow_zone = "Europe/Berlin"\njitter = "30m"\n').renewal
    assert renewal.window == windows("Sat 02:00-03:00")
    assert str(renewal.window_zone) == "Europe/Berlin"
    assert renewal.jitter.most == 30 * MINUTE
    assert parse('[renewal]\njitter = "0s"\n').renewal.jitter == Jitter()


def test_a_window_over_midnight_belongs_to_the_day_of_its_beginning() -> None:
    """Wed 22:00-02:00 is open on Thursday at 01:00, and not on Wednesday at 01:00."""
    night = windows("Wed 22:00-02:00")
    far = at("2027-01-01")
    assert may_act(at("2026-11-26 01:00", BERLIN), night, BERLIN, far).act
    early = may_act(at("2026-11-25 01:00", BERLIN), night, BERLIN, far)
    assert not early.act
    assert early.reason == "the next window begins at Wed 2026-11-25 22:00 CET"


def test_a_window_has_its_beginning_and_not_its_end() -> None:
    """One that ends as another begins leaves no moment between, and none twice."""
    one = windows("Sat 02:00-06:00")
    far = at("2027-01-01")
    assert may_act(at("2026-11-28 02:00", BERLIN), one, BERLIN, far).act
    assert not may_act(at("2026-11-28 06:00", BERLIN), one, BERLIN, far).act
    day = spans(at("2026-11-25"), windows("Sat 00:00-24:00", "Sun 00:00-24:00"), BERLIN)[0]
    assert day == (at("2026-11-28", BERLIN), at("2026-11-30", BERLIN))


def test_windows_that_are_all_of_the_week_are_open_at_any_time() -> None:
    """Such windows have no next one."""
    assert may_act(at("2026-11-25 12:00"), windows("00:00-24:00"), BERLIN, at("2027-01-01")).act


# Clocks in Berlin go from 02:00 to 03:00 on 2026-03-29 and from 03:00 back to 02:00 on 2026-10-25.
@pytest.mark.parametrize(
    ("now", "text", "begin", "end"),
    [
        pytest.param(
            "2026-03-28 12:00", "Sun 01:00-04:00", "2026-03-29 00:00", "2026-03-29 02:00", id="spring, around"
        ),
        pytest.param(
            "2026-03-28 12:00", "Sun 02:30-05:00", "2026-03-29 01:30", "2026-03-29 03:00", id="spring, begins"
        ),
        pytest.param("2026-03-28 12:00", "Sun 01:00-02:30", "2026-03-29 00:00", "2026-03-29 01:30", id="spring, ends"),
        pytest.param("2026-03-28 12:00", "Sun 02:30-03:00", "2026-04-05 00:30", "2026-04-05 01:00", id="spring, none"),
        pytest.param(
            "2026-10-24 12:00", "Sun 01:00-04:00", "2026-10-24 23:00", "2026-10-25 03:00", id="autumn, around"
        ),
        pytest.param("2026-10-24 12:00", "Sun 02:30-02:45", "2026-10-25 00:30", "2026-10-25 00:45", id="autumn, once"),
        pytest.param("2026-10-24 12:00", "Sat 22:00-02:30", "2026-10-24 20:00", "2026-10-25 00:30", id="autumn, ends"),
    ],
)
def test_windows_follow_the_clock_on_the_wall_when_it_changes(now: str, text: str, begin: str, end: str) -> None:
    """A window that the local clock skips is not there, and one that it shows twice is open the first time."""
    assert first_span(at(now), text) == (at(begin), at(end))


clocks = st.integers(0, 24 * 60 - 1).map(lambda m: f"{m // 60:02}:{m % 60:02}")
days = st.lists(st.sampled_from(["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]), max_size=3, unique=True)


@st.composite
def some_windows(draw: st.DrawFn) -> Windows:
    texts = []
    for _ in range(draw(st.integers(1, 3))):
        begin, end = draw(clocks), draw(clocks)
        assume(begin != end)
        texts.append(f"{','.join(draw(days))} {begin}-{end}".strip())
    return windows(*texts)


moments = st.datetimes(datetime(2026, 1, 1), datetime(2028, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001
some_zones = st.sampled_from(["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "UTC"]).map(ZoneInfo)


@given(moments, some_windows(), some_zones)
def test_an_open_window_is_one_by_the_clock_on_the_wall(now: datetime, some: Windows, zone: ZoneInfo) -> None:
    """It is checked on all days but those on which the clock changes, and the one after."""
    local = now.astimezone(zone)
    assume(len({(local + timedelta(days=i)).utcoffset() for i in (-2, -1, 0, 1)}) == 1)
    minute = local.hour * 60 + local.minute
    is_open = any(
        (local.weekday() in w.days and w.begin <= minute < w.end)
        or ((local.weekday() - 1) % 7 in w.days and minute + 24 * 60 < w.end)
        for w in some.windows
    )
    assert may_act(now, some, zone, now + 1000 * DAY).act == is_open


@given(moments, some_windows(), some_zones, st.timedeltas(timedelta(), 40 * DAY))
def test_what_waits_has_two_windows_left_and_two_days(
    now: datetime, some: Windows, zone: ZoneInfo, left: timedelta
) -> None:
    """The message names the beginning of the next window, and a run acts at that moment."""
    decision = may_act(now, some, zone, now + left)
    if decision.act:
        return
    assert left > LAST_DAYS
    begin, _ = spans(now, some, zone)[0]
    assert decision.reason == f"the next window begins at {local_text(begin, zone)}"
    assert begin > now
    inside = may_act(begin, some, zone, now + left)
    assert inside.act
    assert inside.until is not None
    after = spans(inside.until, some, zone)[0]
    assert now < begin < inside.until < after[0] < after[1] < now + left


@given(moments, some_windows(), some_zones, st.timedeltas(6 * HOUR, DAY), st.integers(0, 3))
def test_no_certificate_expires_while_it_waits_for_windows(
    begin: datetime, some: Windows, zone: ZoneInfo, period: timedelta, outages: int
) -> None:
    """A timer that fires at least once a day gets to act, and again when the first tries fail, before the end."""
    expires = begin + 16 * DAY
    tries, now = 0, begin
    while now < expires and tries <= outages:
        tries += may_act(now, some, zone, expires).act
        now += period
    # a daily timer has two tries in the last two days, a faster one more
    assert tries >= min(outages + 1, LAST_DAYS // period)


@pytest.mark.parametrize(
    ("text", "before", "waits"),
    [
        ("Sat 02:00-06:00", 30 * DAY, True),
        ("Sat 02:00-06:00", 8 * DAY, True),
        ("Sat 02:00-06:00", 7 * DAY, False),
        ("02:00-06:00", 3 * DAY, True),
        ("02:00-06:00", 2 * DAY, False),
        ("00:00-24:00", 30 * DAY, False),
    ],
)
def test_windows_that_can_not_matter_are_known(text: str, before: timedelta, *, waits: bool) -> None:
    """A certificate that is due only when two of them are no longer left gives way at once."""
    assert ever_waits(NOW, windows(text), BERLIN, before) == waits


def test_a_certificate_that_has_expired_waits_for_nothing() -> None:
    """An expired certificate is renewed outside the window, too."""
    assert may_act(NOW, windows("Sat 02:00-02:01"), BERLIN, NOW - DAY).act


def test_a_certificate_without_an_end_waits_for_its_window() -> None:
    """The last moment of year 9999, which no zone east of UTC can say."""
    never = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert not may_act(at("2026-11-25 12:00"), windows("Sat 02:00-03:00"), BERLIN, never).act
    assert may_act(at("2026-11-28 02:00", BERLIN), windows("Sat 02:00-03:00"), BERLIN, never).act


# --- the machine's zone ----------------------------------------------------------------------------------------------


def test_an_unknown_zone_is_a_settings_error() -> None:
    """An unknown zone, a path, and a directory of the database are settings errors."""
    for name in ("Europe/Bonn", "../etc/passwd", "Europe", "/etc/localtime"):
        with pytest.raises(SettingsError) as e:
            parse(f'[renewal]\nwindow_zone = "{name}"\n')
        assert e.value.problems[0].key == "renewal.window_zone"


@pytest.mark.parametrize(
    ("tz", "name"),
    [("America/New_York", "America/New_York"), (":Europe/Berlin", "Europe/Berlin"), ("", "UTC"), ("UTC", "UTC")],
)
def test_the_machines_zone_is_the_one_of_its_environment(tz: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zone is found as every other program finds it (tzset(3))."""
    monkeypatch.setenv("TZ", tz)
    assert str(Zone()) == name


def test_a_zone_that_has_no_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings can name it."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    with pytest.raises(SettingsError) as e:
        Zone().resolve()
    assert e.value.problems[0].key == "renewal.window_zone"


def test_without_tz_the_zone_is_that_of_localtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link into the database has a name, a copy of one of its files has none, and without a file it is UTC."""
    monkeypatch.delenv("TZ", raising=False)
    source = Path("/usr/share/zoneinfo/Europe/Berlin")
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(source)
    copy.write_bytes(source.read_bytes())
    summer = datetime(2026, 7, 1, tzinfo=UTC)
    for place, name, offset in (
        (link, "Europe/Berlin", 2 * HOUR),
        (copy, str(copy), 2 * HOUR),
        (tmp_path / "none", "UTC", timedelta()),
    ):
        monkeypatch.setattr(tables, "LOCALTIME", place)
        zone = Zone().resolve()
        assert str(zone) == name
        assert summer.astimezone(zone).utcoffset() == offset


# --- a run -----------------------------------------------------------------------------------------------------------


def item(name: str, end: datetime) -> Item:
    return Item(
        spec=SPECS[name],
        authority_external=True,
        certificate_path=Path(f"/etc/kubernetes/pki/{name}.crt"),
        key_path=None,
        embedded=False,
        anchor_path=Path("/etc/kubernetes/pki/ca.crt"),
        certificates=(Signer.make(begin=end - 365 * DAY, end=end).certificate,),
        state="present",
        trouble=None,
        managed=True,
        listed=True,
    )


def due(**ends: datetime) -> Selection:
    return Selection(items=tuple(item(name, end) for name, end in ends.items()), failed=(), skipped=())


SATURDAYS = RenewalSettings(window=windows("Sat 02:00-06:00"), window_zone=Zone("Europe/Berlin"))
WEDNESDAY = at("2026-11-25 12:00")


def test_what_is_due_and_waits_for_its_window_is_not_done() -> None:
    """Exit code 4, and the message names the zone, the next window and the way around."""
    selection = hold_for_window(due(apiserver=WEDNESDAY + 29 * DAY), SATURDAYS, WEDNESDAY)
    assert selection.items == ()
    [outcome] = selection.failed
    assert outcome.exit_code == Exit.WAITING
    assert isinstance(outcome.error, NotYetError)
    assert "Europe/Berlin" in str(outcome.error)
    assert "Sat 2026-11-28 02:00 CET" in str(outcome.error)


def test_what_can_not_wait_takes_the_rest_with_it() -> None:
    """One interruption, not two."""
    both = due(apiserver=WEDNESDAY + 5 * DAY, **{"front-proxy-client": WEDNESDAY + 29 * DAY})
    assert hold_for_window(both, SATURDAYS, WEDNESDAY) == both


@pytest.mark.parametrize("now", [at("2026-11-28 03:00"), at("2026-11-28 01:00")])
def test_within_the_window_what_is_due_is_renewed(now: datetime) -> None:
    """Both moments are in it, by the clock of Berlin."""
    one = due(apiserver=WEDNESDAY + 29 * DAY)
    assert hold_for_window(one, SATURDAYS, now) == one


def test_nothing_due_waits_for_nothing() -> None:
    """A selection with nothing due passes unchanged."""
    nothing = Selection(items=(), failed=(), skipped=("x",))
    assert hold_for_window(nothing, SATURDAYS, WEDNESDAY) == nothing


def jittered(end: datetime, now: datetime, *, window: Windows | None = None) -> timedelta:
    settings = RenewalSettings(jitter=Jitter(2 * HOUR), window=window or Windows(), window_zone=Zone("Europe/Berlin"))
    return jitter(due(apiserver=end), settings, now, share=0.5)


@pytest.mark.parametrize(
    ("left", "expected"),
    [(30 * DAY, HOUR), (HOUR, HOUR / 4), (timedelta(), timedelta()), (-DAY, timedelta())],
    ids=["long", "an hour", "none", "expired"],
)
def test_the_delay_is_by_chance_and_ends_before_the_certificate(left: timedelta, expected: timedelta) -> None:
    """The delay is a random share of at most half of the time left."""
    assert jittered(WEDNESDAY + left, WEDNESDAY) == expected


def test_the_delay_ends_before_the_window() -> None:
    """The random delay ends before the window does, so that the run does not meet a closed one."""
    assert jittered(WEDNESDAY + 30 * DAY, WEDNESDAY, window=windows("Wed 12:00-13:10")) == 5 * MINUTE


def test_a_run_that_has_nothing_to_do_or_no_jitter_set_does_not_wait() -> None:
    """Half of no certificate's time, and half of no jitter, is none."""
    settings = RenewalSettings(jitter=Jitter(HOUR))
    assert jitter(due(), settings, WEDNESDAY, share=0.5) == timedelta()
    assert jitter(due(apiserver=WEDNESDAY + 9 * DAY), RenewalSettings(), WEDNESDAY, share=0.5) == timedelta()


# --- unit files and cron ---------------------------------------------------------------------------------------------

UNITS = ROOT / "config/systemd"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's keys have capital letters
    parser.read_string((UNITS / name).read_text(encoding="utf-8"))
    return parser


def test_the_timer_starts_the_service_and_catches_up() -> None:
    """The timer starts the service of its name, also after a night in which the machine was off, and not on all nodes at the same second."""
    timer = unit("ca-bridge.timer")["Timer"]
    assert timer["Persistent"] == "yes"
    assert timer["RandomizedDelaySec"] == "30min"
    assert unit("ca-bridge.service")["Service"]["ExecStart"].split()[1:] == ["renew"]
    assert unit("ca-bridge.service")["Unit"]["After"] == "network-online.target"


def test_the_service_fails_where_a_run_does() -> None:
    """As the metrics count it: a run that waits for a person is no unit that has failed, hour after hour."""
    listed = {int(code) for code in unit("ca-bridge.service")["Service"]["SuccessExitStatus"].split()}
    codes = {code for code in vars(Exit).values() if isinstance(code, int)}
    assert listed == {code for code in codes if after(None, code, NOW, 0).failures == 0} - {Exit.DONE} != set()


def test_the_service_may_write_where_a_renewal_writes() -> None:
    """All else is read-only for it."""
    service = unit("ca-bridge.service")["Service"]
    node = parse("").node
    writable = [Path(path.removeprefix("-")) for path in service["ReadWritePaths"].split()]
    assert service["ProtectSystem"] == "strict"
    for place in (node.pki_dir, node.kubeconfig_dir, node.state_dir, Path("/var/lib/kubelet/pki")):
        assert any(place.is_relative_to(path) for path in writable)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze; install systemd")
@pytest.mark.parametrize("name", sorted(path.name for path in UNITS.iterdir()))
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    """systemd warns about no line of the units when the program is in its place."""
    program = shutil.which("true")
    assert program is not None
    for path in UNITS.iterdir():
        text = path.read_text(encoding="utf-8").replace("/usr/bin/ca-bridge", program)
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert (run.returncode, run.stdout + run.stderr) == (0, "")


def test_cron_starts_a_bare_renew() -> None:
    """cron runs it as root and mails all its output to root, who has to do what is left."""
    text = (ROOT / "config/cron/ca-bridge").read_text(encoding="utf-8")
    jobs = [line for line in text.splitlines() if line and not line.startswith("#") and not re.match(r"\w+=", line)]
    assert [job.split()[5:] for job in jobs] == [["root", "/usr/bin/ca-bridge", "renew"]]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", " ".join(jobs[0].split()[:5]))
    assert text.endswith("\n")  # or cron ignores the last line
