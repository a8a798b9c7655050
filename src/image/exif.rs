//! EXIF in picture files: A1111's text and the orientation.

/// The UTF-16 text of the UserComment in a file.
pub fn comment(file: &[u8]) -> Option<String> {
    let tiff = Tiff::find(file)?;
    let (_, directory) = tiff.entry(tiff.number(4, 4)?, 0x8769)?;
    let (len, at) = tiff.entry(tiff.number(directory + 8, 4)?, 0x9286)?;
    let text = tiff.bytes.get(tiff.number(at + 8, 4)?..)?.get(..len)?.strip_prefix(b"UNICODE\0")?;
    // A1111 and we write UTF-16 with the high byte first, whatever the order of the structure.
    let units: Vec<u16> = text.as_chunks::<2>().0.iter().map(|&unit| u16::from_be_bytes(unit)).collect();
    String::from_utf16(&units).ok()
}

/// The orientation in a file: 1 to 8 as EXIF numbers them, where 1 is upright; 1 if there is none.
pub fn orientation(file: &[u8]) -> u8 {
    let found = Tiff::find(file).and_then(|tiff| {
        let (_, at) = tiff.entry(tiff.number(4, 4)?, 0x0112)?;
        // A short number stands at the beginning of the field.
        tiff.number(at + 8, 2)
    });
    found.filter(|n| (1..=8).contains(n)).map_or(1, |n| n as u8)
}

/// A TIFF structure, whose offsets count from its header.
struct Tiff<'a> {
    bytes: &'a [u8],
    big: bool,
}

impl<'a> Tiff<'a> {
    /// The first one in a file.
    fn find(file: &'a [u8]) -> Option<Self> {
        let start = file.windows(8).position(|b| matches!(b, b"II*\0\x08\0\0\0" | b"MM\0*\0\0\0\x08"))?;
        Some(Tiff { bytes: &file[start..], big: file[start] == b'M' })
    }

    fn number(&self, at: usize, len: usize) -> Option<usize> {
        let bytes = self.bytes.get(at..at.checked_add(len)?)?;
        let join = |n: usize, b: &u8| n << 8 | usize::from(*b);
        Some(if self.big { bytes.iter().fold(0, join) } else { bytes.iter().rev().fold(0, join) })
    }

    /// A directory's entry with a tag: the number of its values, and the entry's own place, in which the value, or its
    /// offset if it takes more than four bytes, comes after eight bytes.
    fn entry(&self, directory: usize, tag: usize) -> Option<(usize, usize)> {
        let count = self.number(directory, 2)?;
        let at = (0..count).map(|i| directory + 2 + 12 * i).find(|&at| self.number(at, 2) == Some(tag))?;
        Some((self.number(at + 4, 4)?, at))
    }
}
