"""Cache-aware routing: conversations stay where their beginnings are."""

import expect
from checks import limit
from fleet import CONVERSATIONS, TURNS, converse, fleet, hit_rate


@limit(150)
def conversations_find_their_prefixes_and_the_answers_do_not_change(start) -> None:
    alone = start()
    answers = converse(alone.openai())
    best = hit_rate([alone])
    alone.stop()
    rates = {}
    for policy in ("cache_aware", "random"):
        with fleet(start, policy=policy) as gateway:
            routed = converse(gateway.openai())
            rates[policy] = hit_rate(gateway.workers)
            shares = [int(worker.metrics().value("vllm:prompt_tokens_total")) for worker in gateway.workers]
            for worker in gateway.workers:
                worker.stop()
        for conversation, (got, want) in enumerate(zip(routed, answers, strict=True)):
            for turn, (one, other) in enumerate(zip(got, want, strict=True)):
                expect.equal(one, other, f"{policy}, conversation {conversation}, turn {turn}")
        expect.that(min(shares) > 0, f"{policy}: both workers work: {shares}")
    print(f"        {CONVERSATIONS * TURNS} requests; hit rate alone {best:.3f}, "
          f"cache_aware {rates['cache_aware']:.3f}, random {rates['random']:.3f}")
    expect.that(rates["cache_aware"] >= 0.8 * best, f"cache_aware {rates['cache_aware']:.3f} against {best:.3f} of one worker")
    expect.that(rates["cache_aware"] > rates["random"], f"{rates}")
