"""A run of weeks must not end because nobody was told that a certificate or the list ends."""

from datetime import UTC, datetime, timedelta

from peerlora.network.identity.expiry import SOON, ExpiryWatch

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def test_ends_are_told_once_a_day_until_they_are_renewed():
    now = [NOW]
    ends = {"the certificate": NOW + timedelta(days=SOON + 1.5), "the member list": None}
    due = ExpiryWatch(lambda: ends, lambda: now[0])
    assert due() == []
    now[0] += timedelta(days=2)
    (told,) = due()
    assert told.startswith("the certificate ends in 13 days, on 2026-05-17 00:00 UTC: send a new request")
    assert due() == []
    now[0] += timedelta(days=1)
    assert len(due()) == 1 and due() == []
    ends["the certificate"] += timedelta(days=60)
    assert due() == []
    ends["the member list"] = now[0] - timedelta(hours=1)
    (told,) = due()
    assert told.startswith("the member list has ended, on") and "ask the consortium" in told
