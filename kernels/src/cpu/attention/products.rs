//! What queries and a span's keys and values are multiplied for: scores, and weighed values.
//!
//! (No closures: see `linear.rs`.)

use super::super::kv::TILE;
use super::super::simd::Simd;
use super::elements::Element;
use super::span::{CHUNK, LINE, Lines, SPAN, Seen, TILES};
use crate::KvDtype;

/// Where queries are: [`super::Queries::vectors`] from one of them on.
#[derive(Clone, Copy)]
pub(super) struct Chunks {
    pub(super) first: *const f32,
    /// Elements between a chunk of a query and the next.
    pub(super) apart: usize,
}

/// Dot products of `N` queries with the keys of `M` tiles: lane = position, summed along `head_dim` in order. `scores`: where each tile's begin; a
/// query's are [`SPAN`] apart.
///
/// Meanwhile it asks for the tiles' values, if it is told where they are: at long contexts keys and values come from memory, a few kilobytes here and
/// a few there, which processors do not foresee.
///
/// # Safety
/// All of that is there, and the processor has the instructions of `S`.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
pub(super) unsafe fn score<S: Simd, E: Element, const N: usize, const M: usize>(
    queries: Chunks,
    keys: [*const E; M],
    scales: [*const u16; M],
    ahead: Option<[*const E; M]>,
    d: usize,
    scores: *mut f32,
) {
    unsafe {
        let mut totals = [[[S::vsplat(0.0); 2]; M]; N];
        // Elements of a cache line are one row of a tile's keys, or a few.
        let lines = LINE / (TILE * size_of::<E>());
        for (chunk, first) in (0..d).step_by(CHUNK).enumerate() {
            let queries = queries.first.add(chunk * queries.apart);
            let end = CHUNK.min(d - first);
            let mut begin = 0;
            loop {
                // Elements under one scale are added up by themselves.
                let until = if E::SCALED {
                    end.min(begin + KvDtype::KEY_GROUP)
                } else {
                    end
                };
                let mut sums = totals;
                if E::SCALED {
                    sums = [[[S::vsplat(0.0); 2]; M]; N];
                }
                for i in begin..until {
                    let row = (first + i) * TILE;
                    if let Some(values) = ahead
                        && i % lines == 0
                    {
                        for m in 0..M {
                            S::prefetch_l2(values[m].wrapping_add(row).cast());
                        }
                    }
                    let mut wide = [[S::vsplat(0.0); 2]; M];
                    for m in 0..M {
                        for half in 0..S::HALVES {
                            wide[m][half] = E::load::<S>(keys[m].add(row + half * S::WIDE));
                        }
                    }
                    for n in 0..N {
                        let q = S::vsplat(*queries.add(n * CHUNK + i));
                        for m in 0..M {
                            for half in 0..S::HALVES {
                                sums[n][m][half] = S::vfma(wide[m][half], q, sums[n][m][half]);
                            }
                        }
                    }
                }
                if !E::SCALED {
                    totals = sums;
                    break;
                }
                for m in 0..M {
                    let scales = scales[m].add((first + begin) / KvDtype::KEY_GROUP * TILE);
                    for half in 0..S::HALVES {
                        let scale = S::vload_bf16(scales.add(half * S::WIDE));
                        for n in 0..N {
                            let total = &mut totals[n][m][half];
                            *total = S::vfma(sums[n][m][half], scale, *total);
                        }
                    }
                }
                begin = until;
                if begin == end {
                    break;
                }
            }
        }
        for n in 0..N {
            for m in 0..M {
                for half in 0..S::HALVES {
                    let at = n * SPAN + m * TILE + half * S::WIDE;
                    S::vstore(scores.add(at), totals[n][m][half]);
                }
            }
        }
    }
}

/// What `N` queries make of a span's values: `out[n] · shrink[n] + Σ weights[n][p] · values[p]`, `p` in order.
pub(super) struct Weighed<'a, E, const N: usize> {
    /// Of each query, for each position of the span.
    pub(super) weights: &'a [[f32; SPAN]; N],
    /// What each sum is multiplied by first.
    pub(super) shrink: [f32; N],
    pub(super) out: [*mut f32; N],
    pub(super) seen: Seen<N>,
    /// The values of each tile.
    pub(super) values: [*const E; TILES],
    /// Elements between a value and the next.
    pub(super) apart: usize,
}

impl<E: Element, const N: usize> Weighed<'_, E, N> {
    /// `U` vectors of each query's sum, from element `i` of the outputs and `from` of the values. Meanwhile it asks for its share of what lies `ahead`.
    ///
    /// # Safety
    /// Weights, values and outputs are there, and the processor has the instructions of `S`.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // one promise covers the whole body
    pub(super) unsafe fn vectors<S: Simd, const U: usize, const TOGETHER: bool>(
        &self,
        i: usize,
        from: usize,
        ahead: Option<&mut Lines<'_, E>>,
    ) {
        unsafe {
            let mut sums = [[S::vsplat(0.0); U]; N];
            for n in 0..N {
                for u in 0..U {
                    let before = S::vload(self.out[n].add(i + u * S::WIDE));
                    sums[n][u] = S::vmul(before, S::vsplat(self.shrink[n]));
                }
            }
            let [before, all, after] = self.seen.parts();
            // Adds the value of each position of a range to those sums that it is a part of.
            macro_rules! weigh {
                ($range:expr, |$n:ident, $p:ident| $seen:expr) => {
                    let mut $p = $range.start;
                    while $p < $range.end {
                        let tile = $p / TILE;
                        let end = if TOGETHER {
                            $range.end
                        } else {
                            $range.end.min((tile + 1) * TILE)
                        };
                        let mut value = self.values[tile].add($p % TILE * self.apart + from);
                        // Adds the value of position `p`.
                        macro_rules! position {
                            () => {
                                let mut v = [S::vsplat(0.0); U];
                                for u in 0..U {
                                    v[u] = E::load::<S>(value.add(u * S::WIDE));
                                }
                                for $n in 0..N {
                                    if $seen {
                                        let weight = S::vsplat(self.weights[$n][$p]);
                                        for u in 0..U {
                                            sums[$n][u] = S::vfma(weight, v[u], sums[$n][u]);
                                        }
                                    }
                                }
                                value = value.add(self.apart);
                                $p += 1;
                            };
                        }
                        while $p < end {
                            position!();
                        }
                    }
                };
            }
            if N > 1 {
                weigh!(before, |n, p| self.seen.sees(n, p));
            }
            match ahead {
                None => {
                    weigh!(all, |n, p| true);
                }
                Some(ahead) => {
                    let mut left = Lines::<E>::share(U * S::WIDE);
                    let each = left.div_ceil(SPAN);
                    weigh!(all, |n, p| {
                        if n == 0 {
                            let now = each.min(left);
                            left -= now;
                            for line in ahead.by_ref().take(now) {
                                S::prefetch_l2(line);
                            }
                        }
                        true
                    });
                    // There may be few positions that all see.
                    for line in ahead.by_ref().take(left) {
                        S::prefetch_l2(line);
                    }
                }
            }
            if N > 1 {
                weigh!(after, |n, p| self.seen.sees(n, p));
            }
            for n in 0..N {
                for u in 0..U {
                    S::vstore(self.out[n].add(i + u * S::WIDE), sums[n][u]);
                }
            }
        }
    }

    /// One element of each sum, where no vector is left: as [`Self::vectors`].
    ///
    /// # Safety
    /// As there.
    #[inline(always)]
    #[allow(clippy::undocumented_unsafe_blocks)] // as above
    pub(super) unsafe fn element(&self, i: usize, from: usize) {
        unsafe {
            for n in 0..N {
                let mut sum = *self.out[n].add(i) * self.shrink[n];
                for p in self.seen.from[n]..self.seen.valid[n] {
                    let v = (*self.values[p / TILE].add(p % TILE * self.apart + from)).widen();
                    sum = self.weights[n][p].mul_add(v, sum);
                }
                *self.out[n].add(i) = sum;
            }
        }
    }
}
