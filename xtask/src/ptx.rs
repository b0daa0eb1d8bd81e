//! Reads from PTX text what the audit wants to know: entries, their parameters, directives and instructions.
//!
//! Not a PTX parser: it knows statements, labels and comments, not types or operands. Grammar: *PTX ISA*, sections 4
//! (syntax) and 5 (kernel and function directives).

use std::collections::{BTreeMap, BTreeSet};

/// A module's entries, in the order of their names.
#[derive(Debug, PartialEq)]
pub struct Module {
    pub entries: BTreeMap<String, Entry>,
}

/// One kernel.
#[derive(Debug, Default, PartialEq)]
pub struct Entry {
    pub parameters: Vec<Parameter>,
    /// What stands between the parameters and the body, as `.maxntid 256, 1, 1`.
    pub directives: Vec<String>,
    pub counts: Counts,
    /// Functions that panic, reached from here.
    pub panics: BTreeSet<String>,
}

/// A kernel's parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// As written, less `.param`: `.u64 .ptr .align 1`.
    pub ty: String,
    pub name: String,
}

/// How many instructions of each kind stand in an entry's own body.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub instructions: u32,
    /// `bar` and `barrier`: blocks, warps and clusters.
    pub barriers: u32,
    /// `shfl`.
    pub shuffles: u32,
    /// `vote`, `match`, `redux` and `activemask`.
    pub votes: u32,
    /// `mma` and `wmma`.
    pub mma: u32,
    /// `wgmma.mma_async`.
    pub wgmma: u32,
    /// `ldmatrix` and `stmatrix`.
    pub ldmatrix: u32,
    /// `cp.async` in all its forms, commits and waits included.
    pub cp_async: u32,
    /// `mbarrier`.
    pub mbarrier: u32,
    /// `griddepcontrol`.
    pub griddep: u32,
    /// `call`.
    pub calls: u32,
    /// Floating-point divisions and roots that are correctly rounded: ptxas makes them subroutines.
    pub subroutines: u32,
}

impl Counts {
    /// The kinds that a wrong optimization duplicates or drops, named as in the audit's table.
    pub fn audited(&self) -> [(&'static str, u32); 10] {
        [
            ("barriers", self.barriers),
            ("shuffles", self.shuffles),
            ("votes", self.votes),
            ("mma", self.mma),
            ("wgmma", self.wgmma),
            ("ldmatrix", self.ldmatrix),
            ("cp_async", self.cp_async),
            ("mbarrier", self.mbarrier),
            ("griddep", self.griddep),
            ("calls", self.calls),
        ]
    }

    fn add(&mut self, opcode: &str) {
        self.instructions += 1;
        let kind = opcode.split('.').next().unwrap_or(opcode);
        match kind {
            "bar" | "barrier" => self.barriers += 1,
            "shfl" => self.shuffles += 1,
            "vote" | "match" | "redux" | "activemask" => self.votes += 1,
            "mma" | "wmma" => self.mma += 1,
            "wgmma" if opcode.starts_with("wgmma.mma_async") => self.wgmma += 1,
            "ldmatrix" | "stmatrix" => self.ldmatrix += 1,
            "cp" if opcode.starts_with("cp.async") => self.cp_async += 1,
            "mbarrier" => self.mbarrier += 1,
            "griddepcontrol" => self.griddep += 1,
            "call" => self.calls += 1,
            "div" | "rcp" | "sqrt" if opcode.contains(".rn.f") => self.subroutines += 1,
            _ => {}
        }
    }
}

/// Reads `text`.
///
/// # Errors
///
/// What is malformed, and where: a body that does not end, an entry without a name or parameters, or a module
/// without entries.
pub fn parse(text: &str) -> Result<Module, String> {
    let text = without_comments(text);
    let mut entries = BTreeMap::new();
    let mut called = BTreeMap::new();
    let mut rest = text.as_str();
    while let Some((is_entry, head, body, after)) = next_function(rest)? {
        rest = after;
        let (counts, calls) = body.map(count).unwrap_or_default();
        if is_entry {
            let (name, parameters, directives) = parse_head(head)?;
            called.insert(name.clone(), calls);
            entries.insert(name, Entry { parameters, directives, counts, panics: BTreeSet::new() });
        } else {
            called.insert(function_name(head)?, calls);
        }
    }
    if entries.is_empty() {
        return Err("no .entry".into());
    }
    for (name, entry) in &mut entries {
        entry.panics = reached(name, &called).into_iter().filter(|function| function.contains("panic")).collect();
    }
    Ok(Module { entries })
}

/// Everything that calls lead to from `start`, itself left out.
fn reached(start: &str, called: &BTreeMap<String, BTreeSet<String>>) -> BTreeSet<String> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
    while let Some(function) = open.pop() {
        for callee in called.get(function).into_iter().flatten() {
            if seen.insert(callee.clone()) {
                open.push(callee);
            }
        }
    }
    seen
}

/// `text` with every comment replaced by a space, so that words stay apart.
fn without_comments(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        clean.push_str(&rest[..at]);
        let comment = &rest[at..];
        let len = if comment.starts_with("//") {
            comment.find('\n').unwrap_or(comment.len())
        } else if comment.starts_with("/*") {
            comment.find("*/").map_or(comment.len(), |end| end + 2)
        } else {
            clean.push('/');
            rest = &comment[1..];
            continue;
        };
        clean.push(' ');
        rest = &comment[len..];
    }
    clean + rest
}

/// A function: whether it is an entry, the text from its name to its body, the body if it has one, and what follows.
type Function<'a> = (bool, &'a str, Option<&'a str>, &'a str);

/// The next function in `text`.
fn next_function(text: &str) -> Result<Option<Function<'_>>, String> {
    let starts = [(true, ".entry"), (false, ".func")]
        .into_iter()
        .filter_map(|(is_entry, word)| Some((find_word(text, word)?, is_entry, word)));
    let Some((at, is_entry, word)) = starts.min() else {
        return Ok(None);
    };
    let head = &text[at + word.len()..];
    let end = head.find(['{', ';']).ok_or_else(|| format!("{word} without body or semicolon: {}", start_of(head)))?;
    if head[end..].starts_with(';') {
        return Ok(Some((is_entry, &head[..end], None, &head[end..])));
    }
    let mut depth = 0_usize;
    for (i, c) in head[end..].char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Ok(Some((is_entry, &head[..end], Some(&head[end + 1..end + i]), &head[end + i + 1..])));
        }
    }
    Err(format!("{word} whose body does not end: {}", start_of(head)))
}

/// Where `word` stands in `text` with a space after it.
fn find_word(text: &str, word: &str) -> Option<usize> {
    text.match_indices(word).map(|(at, _)| at).find(|at| text[at + word.len()..].starts_with(char::is_whitespace))
}

fn start_of(text: &str) -> String {
    text.trim().chars().take(60).collect()
}

/// An entry's name, parameters and directives.
fn parse_head(head: &str) -> Result<(String, Vec<Parameter>, Vec<String>), String> {
    let malformed = || format!(".entry without a parameter list: {}", start_of(head));
    let (name, rest) = head.split_once('(').ok_or_else(malformed)?;
    let (list, directives) = rest.split_once(')').ok_or_else(malformed)?;
    let mut parameters = Vec::new();
    for parameter in list.split(',').map(str::trim).filter(|parameter| !parameter.is_empty()) {
        let declared = parameter.strip_prefix(".param").and_then(|rest| rest.trim().rsplit_once(char::is_whitespace));
        let (ty, name) = declared.ok_or_else(|| format!("unknown parameter '{parameter}' of {}", name.trim()))?;
        parameters.push(Parameter { ty: ty.trim().to_owned(), name: name.to_owned() });
    }
    // A directive starts with a point and goes up to the next that does.
    let mut found: Vec<String> = Vec::new();
    for word in directives.split_whitespace() {
        match found.last_mut() {
            Some(directive) if !word.starts_with('.') => *directive = format!("{directive} {word}"),
            _ => found.push(word.to_owned()),
        }
    }
    Ok((name.trim().to_owned(), parameters, found))
}

/// The name in `(.param .b32 result) name (…)`, where both lists may be missing.
fn function_name(head: &str) -> Result<String, String> {
    let head = head.trim();
    let after_result = match head.strip_prefix('(') {
        Some(rest) => rest.split_once(')').map(|(_, rest)| rest),
        None => Some(head),
    };
    let name = after_result.and_then(|rest| rest.split(['(', '.']).next()).map(str::trim);
    match name {
        Some(name) if !name.is_empty() => Ok(name.to_owned()),
        _ => Err(format!(".func without a name: {}", start_of(head))),
    }
}

/// The instructions of a body, and what it calls.
fn count(body: &str) -> (Counts, BTreeSet<String>) {
    let (mut counts, mut calls) = (Counts::default(), BTreeSet::new());
    for statement in statements(body) {
        let mut words = statement.split_whitespace().peekable();
        // Labels, as `$L__BB0_1:`, and a guard, as `@!%p1`, stand before the opcode.
        while words.next_if(|word| word.ends_with(':') || word.starts_with('@')).is_some() {}
        let Some(opcode) = words.next().filter(|opcode| opcode.starts_with(|c: char| c.is_ascii_lowercase())) else {
            continue; // A directive, or nothing.
        };
        counts.add(opcode);
        if opcode.split('.').next() == Some("call") {
            calls.insert(callee(words));
        }
    }
    (counts, calls)
}

/// The statements of `body`, whatever block they stand in.
fn statements(body: &str) -> Vec<String> {
    let (mut all, mut statement, mut in_list) = (Vec::new(), String::new(), false);
    for c in body.chars() {
        match c {
            '}' if in_list => in_list = false,
            // A brace inside a statement opens a list of operands; only after its end or a label does it open a block.
            '{' if !matches!(statement.trim_end().chars().next_back(), None | Some(':')) => in_list = true,
            ';' | '{' | '}' => all.push(std::mem::take(&mut statement)),
            c => statement.push(c),
        }
    }
    all.push(statement);
    all
}

/// What a call names: its first operand, or the one after a list of results.
fn callee<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let operands = words.collect::<Vec<_>>().join(" ");
    let operands = match operands.strip_prefix('(') {
        Some(rest) => rest.split_once(')').map_or("", |(_, rest)| rest),
        None => operands.as_str(),
    };
    operands.trim_start_matches([',', ' ']).split([',', ' ']).next().unwrap_or("").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODULE: &str = r#"
//
// Generated by LLVM NVPTX Back-End; .entry not_this (
//
.version 7.0
.target sm_80
.address_size 64

.extern .func  (.param .b32 func_retval0) vprintf
(
	.param .b64 vprintf_param_0
)
;
.func _ZN4core9panicking18panic_bounds_check17h0123456789abcdefE(
	.param .b64 index
)
.noreturn
{
	trap;
}
.func (.param .b32 r) helper(.param .b32 a) .noreturn
{
	call.uni _ZN4core9panicking18panic_bounds_check17h0123456789abcdefE, (a);
}
/* .entry nor_this ( */
.global .align 1 .b8 text[3] = {1, 2, 3};
	// .globl	foo
.visible .entry foo(
	.param .u64 .ptr .align 1 foo_param_0,
	.param .u64 foo_param_1,
	.param .align 4 .b8 foo_param_2[12]
)
.maxntid 256, 1, 1
.minnctapersm 2
{
	.reg .pred 	%p<3>;
	.pragma "nounroll";
	ld.param.b64 	%rd1, [foo_param_0];
	// begin inline asm
	{ .reg .b32 low, high; mov.b64 {low, high}, %rd1; }
	// end inline asm
$L__BB0_1:
	@%p1 bra 	$L__BB0_3; @!%p2 bar.sync 	0;
	barrier.cta.sync.aligned.all 	0;
	shfl.sync.bfly.b32	%r2, %r1, 16, 31, -1;
	vote.sync.ballot.b32 %r3, %p1, -1; redux.sync.add.s32 %r3, %r3, -1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1, %f2, %f3, %f4 }, { %r1 }, { %r2 }, { %f1 };
	ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];
	cp.async.cg.shared.global [%r1], [%rd1], 16;
	cp.async.commit_group ;
	cp.async.wait_group 0;
	cp.rubbish 0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1}, %rd1, %rd2;
	{ // callseq 0, 0
	.param .b32 param0;
	call.uni (retval0),
	helper,
	(
	param0
	);
	} // callseq 0
$L__BB0_3:
	ret;
}
.visible .entry bar()
{
	ret;
}
"#;

    #[test]
    fn interface_and_launch_bounds_are_read() {
        let module = parse(MODULE).expect("it is well formed");
        assert_eq!(module.entries.keys().collect::<Vec<_>>(), ["bar", "foo"]);
        let foo = &module.entries["foo"];
        let parameters = foo.parameters.iter().map(|p| (p.ty.as_str(), p.name.as_str())).collect::<Vec<_>>();
        let expected =
            [(".u64 .ptr .align 1", "foo_param_0"), (".u64", "foo_param_1"), (".align 4 .b8", "foo_param_2[12]")];
        assert_eq!(parameters, expected);
        assert_eq!(foo.directives, [".maxntid 256, 1, 1", ".minnctapersm 2"]);
        let nothing = Entry { counts: Counts { instructions: 1, ..Counts::default() }, ..Entry::default() };
        assert_eq!(module.entries["bar"], nothing);
    }

    #[test]
    fn instructions_are_counted_by_kind() {
        let counts = parse(MODULE).expect("it is well formed").entries["foo"].counts;
        let expected = Counts {
            instructions: 18,
            barriers: 2,
            shuffles: 1,
            votes: 2,
            mma: 1,
            wgmma: 1,
            ldmatrix: 1,
            cp_async: 3,
            mbarrier: 0,
            griddep: 0,
            calls: 1,
            subroutines: 0,
        };
        assert_eq!(counts, expected);
    }

    #[test]
    fn panics_are_found_through_other_functions() {
        let module = parse(MODULE).expect("it is well formed");
        let panics = module.entries["foo"].panics.iter().map(String::as_str).collect::<Vec<_>>();
        assert_eq!(panics, ["_ZN4core9panicking18panic_bounds_check17h0123456789abcdefE"]);
        assert!(module.entries["bar"].panics.is_empty());
    }

    #[test]
    fn malformed_text_is_refused() {
        for (text, reason) in [
            ("", "no .entry"),
            (".entry foo() { ret;", ".entry whose body does not end: foo() { ret;"),
            (".entry foo { ret; }", ".entry without a parameter list: foo"),
            (".entry foo(.reg .u32 a) { ret; }", "unknown parameter '.reg .u32 a' of foo"),
            (".entry foo()", ".entry without body or semicolon: foo()"),
            (".func (.param .b32 r) { ret; }", ".func without a name: (.param .b32 r)"),
        ] {
            assert_eq!(parse(text), Err(reason.to_owned()));
        }
    }
}
