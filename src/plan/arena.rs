//! Places buffers with known lifetimes in one arena.
//!
//! The largest buffer goes first, and each into the smallest gap between those already placed that are alive at the
//! same time (Pisarchyk and Lee, arXiv 2001.03288, "greedy by size for offset calculation").

/// A buffer of `len` bytes that is alive from position `first` to `last`, both included.
#[derive(Clone, Copy, Debug)]
pub(super) struct Interval {
    pub len: usize,
    pub first: usize,
    pub last: usize,
}

/// Buffers start at multiples of this many bytes: two cache lines of a CPU, one of a GPU.
pub(super) const ALIGN: usize = 128;

/// Offsets of the buffers from `first` on, which is a multiple of [`ALIGN`], and the length of the arena.
pub(super) fn place(intervals: &[Interval], first: usize) -> (Vec<usize>, usize) {
    let mut by_size: Vec<usize> = (0..intervals.len()).filter(|&i| intervals[i].len > 0).collect();
    by_size.sort_by_key(|&i| (std::cmp::Reverse(intervals[i].len), i));

    let mut offsets = vec![0; intervals.len()];
    let mut placed: Vec<usize> = Vec::new(); // by offset
    let mut arena_len = first;
    for i in by_size {
        let len = intervals[i].len.next_multiple_of(ALIGN);
        let mut best: Option<(usize, usize)> = None; // (gap, offset)
        let mut end = first;
        for &other in &placed {
            let (a, b) = (&intervals[i], &intervals[other]);
            if a.first > b.last || b.first > a.last {
                continue;
            }
            if offsets[other] >= end + len {
                let gap = offsets[other] - end;
                if best.is_none_or(|(smallest, _)| gap < smallest) {
                    best = Some((gap, end));
                }
            }
            end = end.max(offsets[other] + b.len.next_multiple_of(ALIGN));
        }
        offsets[i] = best.map_or(end, |(_, offset)| offset);
        arena_len = arena_len.max(offsets[i] + len);
        let at = placed.partition_point(|&p| offsets[p] <= offsets[i]);
        placed.insert(at, i);
    }
    (offsets, arena_len)
}
