//! Makes the mutants: reads guest-tests/guests/src/reference.rs, finds each guard in its syntax tree,
//! and writes the same text again with that guard taken out or turned round, a module for each.
//!
//! The text of `reference` itself stays free of all this: it is there to be copied.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::ops::Range;
use std::path::Path;
use std::process::ExitCode;

use proc_macro2::Span;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{BinOp, Expr, Pat};

const SOURCE: &str = "../guests/src/reference.rs";
/// What is mutated begins and ends here: the loop, without the guest test around it and the tests.
const BEGIN: &str = "/// Replies in a row without progress at which the conversion fails.";
const END: &str = "#[cfg(test)]";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    match write() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{SOURCE}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn write() -> Result<(), String> {
    let text = std::fs::read_to_string(SOURCE).map_err(|error| error.to_string())?;
    let begin = text.find(BEGIN).ok_or("the begin of what is mutated is not there")?;
    let end = text.find(END).ok_or("the end of what is mutated is not there")?;
    let text = text.get(begin..end).ok_or("the end is before the begin")?;
    let file = syn::parse_file(text).map_err(|error| error.to_string())?;
    let mut guards = Guards { text, mutations: BTreeSet::new() };
    guards.visit_file(&file);

    let mut modules = String::new();
    let mut list = String::new();
    module(&mut modules, "original", text);
    for (number, Mutation { at, is }) in guards.mutations.iter().enumerate() {
        let name = format!("m{number}");
        module(&mut modules, &name, &[&text[..at.0], is, &text[at.1..]].concat());
        let was = &text[at.0..at.1];
        let line = text[..at.0].rsplit('\n').next().unwrap_or_default().to_owned()
            + text[at.0..].lines().next().unwrap_or_default();
        let _ = writeln!(
            list,
            "    Mutant {{ line: {:?}, was: {:?}, is: {:?}, convert: {name}::convert }},",
            line.trim(),
            one_line(was),
            one_line(is)
        );
    }
    let out = std::env::var_os("OUT_DIR").ok_or("no OUT_DIR")?;
    let code = format!("/// All mutants.\npub const MUTANTS: &[Mutant] = &[\n{list}];\n{modules}");
    std::fs::write(Path::new(&out).join("mutants.rs"), code).map_err(|error| error.to_string())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn module(modules: &mut String, name: &str, text: &str) {
    let _ = writeln!(
        modules,
        "#[allow(warnings, clippy::all)]\nmod {name} {{\nuse super::prelude::*;\n{text}"
    );
    modules.push_str(
        "pub(super) fn convert(td: &mut AnyTd<'_>, c: &Conversion) -> Converted {\n\
             let bound = c.bound.or(Some(STALLS));\n\
             convert_range(td, c.gpa, c.size, c.to, c.shared_bit, bound).map_err(|_| GaveUp)\n\
         }\n}\n",
    );
}

/// A piece of the text, from byte to byte, and what it is replaced by.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Mutation {
    at: (usize, usize),
    is: String,
}

/// Collects the mutations of a syntax tree.
struct Guards<'a> {
    text: &'a str,
    mutations: BTreeSet<Mutation>,
}

impl Guards<'_> {
    fn text(&self, span: Span) -> &str {
        &self.text[span.byte_range()]
    }

    fn replace(&mut self, at: Range<usize>, is: &str) {
        self.mutations.insert(Mutation { at: (at.start, at.end), is: is.to_owned() });
    }

    /// The condition holds always, never, and exactly when it did not.
    fn condition(&mut self, condition: &Expr) {
        // `if let` has no value to replace.
        if !matches!(condition, Expr::Let(_)) {
            let not = format!("!({})", self.text(condition.span()));
            for is in ["true", "false", &not] {
                self.replace(condition.span().byte_range(), is);
            }
        }
    }

    /// Anything does where the pattern wants a constant.
    fn constants(&mut self, pattern: &Pat) {
        match pattern {
            Pat::Tuple(tuple) => tuple.elems.iter().for_each(|pattern| self.constants(pattern)),
            Pat::Path(path) => self.replace(path.span().byte_range(), "_"),
            // A constant without a path looks like a name.
            Pat::Ident(name) if is_constant(&name.ident) => {
                self.replace(name.span().byte_range(), "_");
            }
            _ => {}
        }
    }
}

fn is_constant(name: &syn::Ident) -> bool {
    name.to_string().chars().all(|c| c == '_' || c.is_ascii_uppercase())
}

/// Whether every value matches.
fn takes_all(pattern: &Pat) -> bool {
    match pattern {
        Pat::Wild(_) => true,
        Pat::Ident(name) => !is_constant(&name.ident),
        Pat::Tuple(tuple) => tuple.elems.iter().all(takes_all),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Guards<'_> {
    fn visit_expr_binary(&mut self, binary: &'ast syn::ExprBinary) {
        let at = binary.span().byte_range();
        let (left, right) = (self.text(binary.left.span()), self.text(binary.right.span()));
        let (left, right) = (left.to_owned(), right.to_owned());
        match &binary.op {
            // Without one of the two.
            BinOp::And(_) | BinOp::Or(_) => {
                self.replace(at.clone(), &left);
                self.replace(at, &right);
            }
            BinOp::Lt(_) | BinOp::Le(_) | BinOp::Gt(_) | BinOp::Ge(_) => {
                let not = format!("!({left} {} {right})", self.text(binary.op.span()));
                self.replace(at, &not);
                let shifted = match &binary.op {
                    BinOp::Lt(_) => "<=",
                    BinOp::Le(_) => "<",
                    BinOp::Gt(_) => ">=",
                    _ => ">",
                };
                self.replace(binary.op.span().byte_range(), shifted);
            }
            BinOp::Eq(_) => self.replace(binary.op.span().byte_range(), "!="),
            BinOp::Ne(_) => self.replace(binary.op.span().byte_range(), "=="),
            // A mask.
            BinOp::BitAnd(_) => self.replace(at, &left),
            // Counters and positions.
            BinOp::AddAssign(_) => self.replace(at, "()"),
            _ => {}
        }
        visit::visit_expr_binary(self, binary);
    }

    fn visit_expr_method_call(&mut self, call: &'ast syn::ExprMethodCall) {
        if call.method == "is_multiple_of" || call.method == "is_some_and" {
            let not = format!("!({})", self.text(call.span()));
            self.replace(call.span().byte_range(), &not);
        }
        visit::visit_expr_method_call(self, call);
    }

    fn visit_expr_if(&mut self, expr: &'ast syn::ExprIf) {
        self.condition(&expr.cond);
        visit::visit_expr_if(self, expr);
    }

    fn visit_expr_while(&mut self, expr: &'ast syn::ExprWhile) {
        self.condition(&expr.cond);
        visit::visit_expr_while(self, expr);
    }

    fn visit_expr_for_loop(&mut self, expr: &'ast syn::ExprForLoop) {
        if let Expr::Range(syn::ExprRange { end: Some(end), .. }) = &*expr.expr {
            self.replace(end.span().byte_range(), "u64::MAX");
        }
        visit::visit_expr_for_loop(self, expr);
    }

    fn visit_expr_match(&mut self, expr: &'ast syn::ExprMatch) {
        let last_takes_all = expr.arms.last().is_some_and(|arm| takes_all(&arm.pat));
        for arm in &expr.arms {
            if let Some((_, guard)) = &arm.guard {
                self.condition(guard);
            }
            if last_takes_all && !takes_all(&arm.pat) {
                self.replace(arm.span().byte_range(), "");
                self.constants(&arm.pat);
            }
        }
        visit::visit_expr_match(self, expr);
    }

    fn visit_expr_assign(&mut self, assign: &'ast syn::ExprAssign) {
        // The assignment of a whole match is the loop itself.
        if !matches!(&*assign.right, Expr::Match(_)) {
            self.replace(assign.span().byte_range(), "()");
        }
        visit::visit_expr_assign(self, assign);
    }

    fn visit_expr_break(&mut self, expr: &'ast syn::ExprBreak) {
        self.replace(expr.span().byte_range(), "()");
    }

    fn visit_expr_try(&mut self, expr: &'ast syn::ExprTry) {
        // The failure is ignored.
        let is = format!("let _ = {}", self.text(expr.expr.span()));
        self.replace(expr.span().byte_range(), &is);
        visit::visit_expr_try(self, expr);
    }

    fn visit_pat_tuple(&mut self, tuple: &'ast syn::PatTuple) {
        // `let (true, true, Some(end)) = ... else`: each condition that it asks for.
        for pattern in &tuple.elems {
            if let Pat::Lit(literal) = pattern {
                self.replace(literal.span().byte_range(), "_");
                self.replace(literal.span().byte_range(), "false");
            }
        }
        visit::visit_pat_tuple(self, tuple);
    }
}
