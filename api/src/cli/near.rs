//! What was probably meant by a word that is not known.

/// The candidate that is nearest to `word`, if it is near enough to be a slip.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let slips_max = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(word, known), known))
        .filter(|(slips, _)| *slips <= slips_max)
        .min()
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_mended_and_another_word_is_not() {
        let known = ["hello", "resize-image", "memory"];
        assert_eq!(nearest("helo", known), Some("hello"));
        assert_eq!(nearest("memroy", known), Some("memory"));
        assert_eq!(nearest("resize_images", known), Some("resize-image"));
        assert_eq!(nearest("thumbnail", known), None);
        assert_eq!(nearest("x", known), None);
    }
}
