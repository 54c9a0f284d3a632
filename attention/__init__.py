"""Multi-head latent attention: weights, backends, paged latent KV, prefix cache, data-parallel gather and scatter.

Never knows mixture of experts or servers. "Page" is KV memory; a page row of a sequence lists its pages in order.
"""
