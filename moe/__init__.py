"""Mixture-of-experts layers: gate, dispatch to expert ranks, experts, combine. Never knows attention, servers or overlap."""
